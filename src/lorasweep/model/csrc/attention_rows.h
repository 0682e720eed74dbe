/* Attention inside a row and head, in float: what does not depend on the type of activations.
 *
 * Arrays are padded with zeros to whole vectors, so that nothing is done one by one: what is left
 * over after whole vectors would take longer than all the rest. */
#define QUERIES 4 /* that share one pass over keys and values */
#define DRAWN 64  /* random bytes are drawn in multiples of this: whole vectors of words */

/* Rows of a batch as attention sees them; all arrays are (rows,). */
typedef struct {
  int64_t rows;
  const int64_t *first;       /* token with which each row starts */
  const int64_t *length;      /* its tokens */
  const int64_t *query_first; /* where its queries start */
  const int64_t *query_count; /* how many of its first tokens ask */
} Rows;

typedef struct {
  int64_t heads, width;
  float scaling;
  int64_t window; /* a token sees those nearer than this; 0 for all */
  const int64_t *streams; /* (tokens,), or NULL for no dropout */
  int64_t key;
  int32_t rate; /* of 256 */
} Attending;

/* Scratch memory of one thread, for a row and head. */
typedef struct {
  float *key_columns, *value_columns;                 /* (wide, keys) */
  float *key, *value, *key_gradient, *value_gradient; /* (keys, wide) */
  float *query, *out;                                 /* (QUERIES, wide) */
  float *score, *gradient, *weight;                   /* (QUERIES, keys) */
  uint8_t *bytes;                                     /* (QUERIES, keys rounded up to DRAWN) */
  void *memory;
} Scratch;

static int scratch_made(Scratch *s, int64_t longest, int64_t width) {
  int64_t keys = rounded_up(longest, LANES), wide = rounded_up(width, LANES);
  int64_t grid = keys * wide, block = QUERIES * wide, row = QUERIES * keys;
  int64_t floats_of_all = rounded_up(6 * grid + 2 * block + 3 * row, 16);
  s->memory = aligned_alloc(64, (size_t)(floats_of_all * 4 + QUERIES * rounded_up(keys, DRAWN)));
  if (!s->memory) return 0;
  float *at = s->memory;
  s->bytes = (uint8_t *)(at + floats_of_all);
  float **grids[] = {&s->key_columns, &s->value_columns, &s->key,
                     &s->value, &s->key_gradient, &s->value_gradient};
  for (int i = 0; i < 6; i++, at += grid) *grids[i] = at;
  float **blocks[] = {&s->query, &s->out};
  for (int i = 0; i < 2; i++, at += block) *blocks[i] = at;
  float **rows[] = {&s->score, &s->gradient, &s->weight};
  for (int i = 0; i < 3; i++, at += row) *rows[i] = at;
  return 1;
}

static inline int64_t longest_row(const Rows *rows) {
  int64_t longest = 1;
  for (int64_t r = 0; r < rows->rows; r++)
    longest = rows->length[r] > longest ? rows->length[r] : longest;
  return longest;
}

/* to (QUERIES, across) = left (QUERIES, inner) times right (inner, across); left's rows lie `apart`
 * from one another. */
INLINE void multiply(float *restrict to, const float *restrict left, float *restrict right,
                     int64_t inner, int64_t apart, int64_t across) {
  for (int64_t c = 0; c < across; c += LANES) {
    floats sum[QUERIES] = {0};
    for (int64_t i = 0; i < inner; i++) {
      floats row = *vector(right + i * across + c);
      for (int b = 0; b < QUERIES; b++) sum[b] += left[b * apart + i] * row;
    }
    for (int b = 0; b < QUERIES; b++) *vector(to + b * across + c) = sum[b];
  }
}

/* to[j] += sum over queries of weight[b][j] times rows[b]: (keys, wide). */
INLINE void add_outer(float *restrict to, const float *restrict weight, float *restrict rows,
                      int64_t length, int64_t keys, int64_t wide) {
  for (int64_t d = 0; d < wide; d += LANES) {
    floats row[QUERIES];
    for (int b = 0; b < QUERIES; b++) row[b] = *vector(rows + b * wide + d);
    for (int64_t j = 0; j < length; j++) {
      floats sum = *vector(to + j * wide + d);
      for (int b = 0; b < QUERIES; b++) sum += weight[b * keys + j] * row[b];
      *vector(to + j * wide + d) = sum;
    }
  }
}

/* Transpose a square of vectors in place: of its four quarters the right upper and the left lower
 * one change places, then so inside each quarter, down to single numbers. */
INLINE void transpose_square(floats *row) {
  const ints at = counting_from(0);
#pragma GCC unroll 4
  for (int size = LANES / 2; size; size /= 2) {
    /* Places in a pair of vectors, the second's counted on from LANES. */
    ints right = (at & size) != 0;
    ints upper = (right & (at + LANES - size)) | (~right & at);
    ints lower = (right & (at + LANES)) | (~right & (at + size));
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & size)) {
        floats a = row[i], b = row[i + size];
        row[i] = __builtin_shuffle(a, b, upper);
        row[i + size] = __builtin_shuffle(a, b, lower);
      }
  }
}

/* to (wide, keys) = from (keys, wide), transposed. */
INLINE void transposed(float *restrict to, float *restrict from, int64_t keys, int64_t wide) {
  for (int64_t j = 0; j < keys; j += LANES)
    for (int64_t d = 0; d < wide; d += LANES) {
      floats square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = *vector(from + (j + i) * wide + d);
      transpose_square(square);
      for (int i = 0; i < LANES; i++) *vector(to + (d + i) * keys + j) = square[i];
    }
}

/* Fetch one head's `bytes` of `count` tokens, `apart` from one another, into the second cache: they
 * lie too far apart for a processor to see it coming. */
INLINE void fetch(const void *from, int64_t apart, int64_t count, int64_t bytes, const int write) {
  for (int64_t j = 0; j < count; j++)
    for (int64_t c = 0; c < bytes; c += 64) {
      const char *at = (const char *)from + j * apart + c;
      if (write)
        __builtin_prefetch(at, 1, 2);
      else
        __builtin_prefetch(at, 0, 2);
    }
}

/* The random bytes of `count` queries, the first of which is `token`: one for each key. */
INLINE void draw(uint8_t *bytes, const Attending *how, int64_t token, int64_t count, int64_t head,
                 int64_t keys) {
  int64_t drawn = rounded_up(keys, DRAWN);
  for (int64_t b = 0; b < count; b++) {
    uint64_t stream = (uint64_t)how->streams[token + b] * (uint64_t)(2 * head + 1);
    random_bytes((uint64_t *)(bytes + b * drawn), stream, (uint64_t)how->key, drawn / 8);
  }
}

/* What dropout multiplies kept weights by. */
INLINE float scale_kept(const Attending *how) {
  return how->streams ? 256.0f / (256.0f - (float)how->rate) : 1.0f;
}

/* What is kept of the keys from j on, times dropout's scale. */
INLINE floats kept_from(const uint8_t *bytes, const Attending *how, int64_t j) {
  octets byte;
  memcpy(&byte, bytes + j, sizeof byte);
  ints kept = __builtin_convertvector(byte, ints) >= how->rate;
  return where(kept, spread(scale_kept(how)), spread(0.0f));
}

/* Which of the keys from j on query i sees. */
INLINE ints seen_from(const Attending *how, int64_t i, int64_t j, int64_t length) {
  ints at = counting_from(j), seen = at < (int32_t)length;
  if (how->window) {
    int32_t query = (int32_t)i;
    int32_t window = (int32_t)(how->window < length ? how->window : length);
    seen &= (at > query - window) & (at < query + window);
  }
  return seen;
}

/* Replace query i's scores by its weights: softmax and dropout, 0 where unseen. Returns the
 * logarithm of softmax's sum. */
INLINE float weigh(float *restrict score, const uint8_t *bytes, const Attending *how, int64_t i,
                   int64_t length, int64_t keys) {
  floats most = spread(-INFINITY), sum = spread(0.0f);
  for (int64_t j = 0; j < keys; j += LANES) {
    floats x = where(seen_from(how, i, j, length), *vector(score + j), spread(-INFINITY));
    *vector(score + j) = x;
    most = where(x > most, x, most);
  }
  float largest = largest_of(most);
  for (int64_t j = 0; j < keys; j += LANES) {
    floats x = exp_of((*vector(score + j) - largest) * how->scaling);
    *vector(score + j) = x;
    sum += x;
  }
  float total = sum_of(sum);
  for (int64_t j = 0; j < keys; j += LANES) {
    floats kept = how->streams ? kept_from(bytes, how, j) : spread(1.0f);
    *vector(score + j) *= kept / total;
  }
  return largest * how->scaling + logf(total);
}

/* From query i's scores, the gradient of its weights, and what weigh returned: its weights after
 * dropout (into `weight`) and the gradient of its scores (into `gradient`). */
INLINE void weigh_backward(float *restrict score, float *restrict gradient, float *restrict weight,
                           const uint8_t *bytes, const Attending *how, float sum, int64_t i,
                           int64_t length, int64_t keys) {
  floats products = spread(0.0f);
  for (int64_t j = 0; j < keys; j += LANES) {
    floats share = exp_of(*vector(score + j) * how->scaling - sum);
    share = where(seen_from(how, i, j, length), share, spread(0.0f));
    floats scale = how->streams ? kept_from(bytes, how, j) : spread(1.0f);
    floats slope = *vector(gradient + j) * scale;
    *vector(weight + j) = share * scale;
    *vector(score + j) = share;
    *vector(gradient + j) = slope;
    products += share * slope;
  }
  float inner = sum_of(products);
  for (int64_t j = 0; j < keys; j += LANES)
    *vector(gradient + j) = *vector(score + j) * (*vector(gradient + j) - inner) * how->scaling;
}

/* The body of a function that does `head_of` for each row and head, on all threads; it returns
 * 0 when memory ran out. `made` makes the Memory `s` of a thread. Where there are enough rows, a
 * thread takes all heads of a row, whose numbers lie side by side. */
#define FOR_EACH_HEAD(Memory, made, head_of, ...)                 \
  int64_t longest = longest_row(rows), heads = how->heads;        \
  int64_t together = rows->rows >= 4 * threads ? heads : 1;       \
  int failed = 0;                                                 \
  _Pragma("omp parallel num_threads(threads)") {                  \
    Memory s;                                                     \
    int there = made;                                             \
    if (!there) {                                                 \
      _Pragma("omp atomic write") failed = 1;                     \
    }                                                             \
    _Pragma("omp for schedule(dynamic, together) collapse(2)")    \
    for (int64_t r = 0; r < rows->rows; r++)                      \
      for (int64_t h = 0; h < heads; h++)                         \
        if (there) head_of(&s, __VA_ARGS__, rows, how, r, h);     \
    if (there) free(s.memory);                                    \
  }                                                               \
  return !failed;
