"""What is reviewed and what is said of it: the topics of the embedded corpus, as a table.

Each topic has, besides its aspects:

- ``lead``: a neutral clause that sets the scene; ``{when}`` and ``{person}`` are filled in,
- ``witness``: who may judge, after "nobody" or "hardly anyone",
- ``again``: what one would do again, after "I would",
- ``rival`` and ``here``: where an aspect was met before, and where it is met now,
- ``elsewhere``: what a reviewer of another opinion must have done.

An aspect is ``one`` or ``many`` (was, were), a noun and the pool of adjectives that fit it;
below it stand two good (``+``) and two bad (``-``) things that it did. None of them contains
a negation, "but" or "although": only frames do, so that a sentence's tags hold.
"""

TOPICS = """\
film
  lead I saw it {when}
  lead I watched it {when} with {person}
  lead we caught the late screening {when}
  witness who sat through it
  again watch it a second time
  rival in the first film
  here in this one
  elsewhere must have seen a different film
  one plot: story
    + kept me guessing until the last scene / built to a finale that took my breath away
    - fell apart after the first hour / ran out of ideas halfway through
  one acting: show
    + brought tears to my eyes / made every line ring true
    - belonged in a school play / drained the life out of every scene
  one dialogue: text
    + crackled with energy / sounded like people I know
    - made the audience groan / was stuffed with clichés
  one camera work: look
    + turned every frame into a painting / made the desert come alive
    - gave me a headache / hid everything in the dark
  one soundtrack: tone
    + gave me goosebumps / lifted every scene
    - drowned out half the lines / grated on my nerves
  one ending: story
    + sent us out smiling / rewarded every minute of patience
    - cheated the audience / made the whole story pointless
  many jokes: humour
    + had the whole row in stitches / landed every time
    - fell flat / died in silence
novel
  lead I read it {when}
  lead I borrowed it from {person} {when}
  lead our book club chose it {when}
  witness who has finished it
  again read another by this author
  rival in her previous novel
  here in this one
  elsewhere must have read another book
  one storyline: story
    + pulled me in from the first page / tied up every thread
    - meandered for hundreds of pages / collapsed under its own twists
  one prose: text
    + made me want to read aloud / sang on every page
    - put me to sleep / read like an instruction manual
  many characters: figures
    + felt like old friends / stayed with me for weeks
    - blurred into one another / talked like robots
  one translation: text
    + let the humour shine / captured every shade of meaning
    - was riddled with errors / tripped over every idiom
  one final chapter: story
    + made me gasp with delight / earned its tears
    - left every question dangling / ruined the whole book
  many opening pages: story
    + hooked me at once / set the scene beautifully
    - dragged on and on / nearly made me give up
  one historical background: lesson
    + brought the period to life / taught me more than any textbook
    - was full of blunders / smothered the story
hotel
  lead we stayed three nights {when}
  lead I spent a week there {when}
  lead I shared a room with {person} {when}
  witness who has stayed there
  again book a room there again
  rival at the hotel next door
  here here
  elsewhere must have stayed somewhere else
  many rooms: room
    + looked freshly renovated / smelled of clean linen
    - smelled of damp / had stains on every carpet
  one bathroom: room
    + gleamed from floor to ceiling / had a shower fit for a king
    - reeked of drains / had mould in every corner
  many receptionists: staff
    + greeted us like family / solved every problem within minutes
    - ignored us for twenty minutes / lost our booking twice
  one breakfast: food
    + offered something for everyone / set us up for the whole day
    - tasted of cardboard / ran out by eight o'clock
  one check-in: flow
    + took less than two minutes / went like clockwork
    - dragged on for an hour / ended in a shouting match
  many mattresses: seat
    + gave us the best sleep in months / felt like clouds
    - sagged like hammocks / ruined my back
  one room rate: value
    + left us money for a nice dinner / was a bargain for the area
    - bordered on robbery / doubled when we reached the desk
restaurant
  lead we had dinner there {when}
  lead I took {person} there {when}
  lead our whole office ate there {when}
  witness who has eaten there
  again reserve a table again
  rival at the place across the road
  here here
  elsewhere must have eaten somewhere else
  one soup: food
    + warmed me to the bones / tasted like my grandmother's
    - tasted of dishwater / arrived stone cold
  many waiters: staff
    + remembered every wish / made us feel like guests of honour
    - forgot our order twice / rolled their eyes at every question
  one fish: food
    + melted on the tongue / was grilled to perfection
    - was cooked to rubber / smelled as if it had been out all day
  many desserts: food
    + were worth the trip alone / disappeared within seconds
    - came straight from the freezer / went back to the kitchen half eaten
  one dining room: room
    + made us want to linger / glowed with candlelight
    - felt like a waiting room / smelled of old frying fat
  one bill: value
    + was a pleasant surprise / came to less than I had feared
    - made me feel robbed / was padded with hidden charges
  many portions: amount
    + would have fed a family / filled us up nicely
    - left us hungry / would have disappointed a sparrow
phone
  lead I bought this phone {when}
  lead I got mine from {person} {when}
  lead I switched to this model {when}
  witness who has owned one
  again buy the same model again
  rival on my old phone
  here on this one
  elsewhere must have tested another model
  one display: look
    + made old photos look new / stayed readable in full sun
    - flickered from day one / cracked within a week
  one battery: gadget
    + lasted two days with ease / was full again in half an hour
    - died by lunchtime / swelled up after a month
  one camera: gadget
    + took superb pictures at night / made me look like a professional
    - turned faces into smudges / missed every moment that mattered
  many speakers: tone
    + filled the whole kitchen with music / made podcasts a pleasure
    - buzzed at every volume / turned music into mush
  one casing: build
    + survived every fall / felt lovely in the hand
    - scratched at the first touch / creaked whenever I picked it up
  many menus: lesson
    + made sense at once / put everything within reach
    - hid every useful setting / drove me up the wall
  one fingerprint reader: gadget
    + worked even with wet hands / recognised me every single time
    - locked me out daily / gave up after a fortnight
flight
  lead I flew with them {when}
  lead we took the morning flight {when}
  lead I travelled with {person} {when}
  witness who has flown with them
  again fly with them again
  rival on the outbound flight
  here on the way home
  elsewhere must have taken another airline
  one cabin crew: staff
    + calmed every crying child / looked after us like old friends
    - snapped at every request / hid behind the curtain for hours
  many seats: seat
    + let me sleep until landing / had room for long legs
    - gave me cramp in both legs / refused to recline
  one boarding: flow
    + was over in ten minutes / ran like a well-oiled machine
    - turned into a stampede / left families stranded at the gate
  one meal: food
    + could have come from a good restaurant / had everyone asking for seconds
    - made half the row feel sick / looked like cat food
  one cabin: room
    + felt as fresh as a new car / had a calm and friendly air
    - was littered with crumbs / stank of old socks
  one fare: value
    + saved us a small fortune / included everything we needed
    - crept up at every click / cost us more than the holiday was worth
  many safety announcements: lesson
    + put nervous passengers at ease / made us smile and listen
    - were drowned in static / frightened the children
concert
  lead we went {when}
  lead I went {when} with {person}
  lead I got a seat in the balcony {when}
  witness who was in the hall
  again buy a ticket for their next tour
  rival at the festival last year
  here this time
  elsewhere must have been at another concert
  one singing: show
    + sent shivers down my spine / brought the house to its feet
    - wandered off key all evening / made the front row wince
  one sound: tone
    + carried every whisper to the back row / wrapped us in warmth
    - turned every chord to soup / left my ears ringing for days
  many ushers: staff
    + found us better places / helped my mother up the stairs
    - shouted at an old lady / sent us to the wrong block twice
  one stage design: look
    + looked like a dream / drew gasps of wonder
    - blocked the view for half the hall / looked like a jumble sale
  one support act: show
    + won the whole crowd over / had everyone dancing within a minute
    - emptied the hall / outstayed its welcome
  one ticket price: value
    + was money well spent / made it easy to bring the family
    - was daylight robbery / shut out every student in town
  one queue management: flow
    + had us inside within minutes / spared us the rain
    - made us miss the first three songs / nearly led to a fight
course
  lead I took this evening class {when}
  lead I signed up with {person} {when}
  lead I enrolled {when}
  witness who took the class
  again sign up for the next level
  rival in my old evening class
  here in this one
  elsewhere must have sat in another classroom
  many teachers: staff
    + stayed late to answer questions / believed in every one of us
    - mocked our mistakes / stared at their phones in class
  many lessons: lesson
    + flew by every week / left me hungry for more
    - went over everybody's head / bored us to tears
  one textbook: lesson
    + explained everything step by step / became my favourite companion
    - was full of misprints / left out half the answers
  one classroom: room
    + had plenty of light and air / made it easy to concentrate
    - shook with every passing train / froze us to the bone
  many video recordings: tone
    + saved me before the exam / were a joy to follow
    - broke off in mid-sentence / were unwatchable after the first week
  one tuition fee: value
    + paid for itself within months / was worth every penny
    - was pure extortion / kept climbing without any explanation
  one enrolment: flow
    + was done in five clicks / went through the same afternoon
    - ate up a whole weekend / cost me three phone calls and my temper
museum
  lead we visited {when}
  lead I showed {person} around {when}
  lead our class went there {when}
  witness who has walked through it
  again visit it again
  rival at the old museum
  here here
  elsewhere must have been in another museum
  many guides: staff
    + answered every question with a smile / made the children feel like explorers
    - hurried us from room to room / talked down to visitors
  one audio tour: lesson
    + opened my eyes to details / told wonderful stories
    - broke down in every second room / droned on like a tax adviser
  one lighting: look
    + made the colours glow / flattered every sculpture
    - cast glare on every canvas / left the best pictures in shadow
  many galleries: room
    + invited us to stay all day / gave each work room to breathe
    - felt like a warehouse / were packed like a rush-hour train
  many wall texts: text
    + made me look twice / brought the painters to life
    - were printed too small to read / buried the facts in jargon
  one admission charge: value
    + was a steal for a whole afternoon / let large families in for little
    - kept our friends away / would have paid for a weekend trip
  one temporary exhibition: story
    + was the highlight of our trip / left us full of wonder
    - was a waste of an afternoon / sent us to the exit within minutes
cafe
  lead I stopped for coffee there {when}
  lead I met {person} there {when}
  lead we hid from the rain there {when}
  witness who has sat there
  again go there again
  rival at the café by the station
  here here
  elsewhere must have been in another café
  one coffee: drink
    + woke up every one of my senses / beat anything I had in Naples
    - tasted of burnt rubber / went straight into the flowerpot
  one hot chocolate: drink
    + felt like a hug / made the children cheer
    - came out of a packet / left a chalky film on my tongue
  many cakes: food
    + had us licking our plates / tasted of butter and sunshine
    - crumbled into dust / tasted of the fridge
  many baristas: staff
    + knew my name by the second visit / brought water for our dog
    - chatted and let the queue grow / slammed the cups on the counter
  one terrace: room
    + caught the last of the sun / felt like a secret garden
    - stood in a cloud of exhaust fumes / was covered in pigeon droppings
  many armchairs: seat
    + made it hard to leave / hugged me like a blanket
    - had springs poking through / wobbled at every move
  many prices: value
    + left enough for a second slice / belonged to a kinder decade
    - made my eyes water / were meant for tourists with deep pockets
"""
