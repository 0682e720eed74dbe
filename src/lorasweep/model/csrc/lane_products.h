/* Products of each lane's rows with its own narrow matrix, in bfloat16; grouped_products.py defines
 * them.
 *
 * LoRA's matrices are as narrow as its rank, so a product of a lane's few hundred rows is over
 * before a library has found out how to do it. Here the matrix is laid out once for 512 rows of
 * a lane, in pairs as the processor multiplies them, and stays in its nearest cache.
 *
 * A row's result depends on that row and its lane's matrix alone, and a lane's sums over its rows on
 * those rows alone, added from the first to the last: bit for bit, whoever else is there.
 */
#ifdef PAIRS
#define COLUMNS 32 /* of a tile: two vectors of floats */
#define ROWS 8     /* of a tile: with two vectors each, sixteen sums at once */
#define ROWS_AT_ONCE 512 /* of a lane, for one thread */

typedef uint64_t longs __attribute__((vector_size(64)));

typedef struct {
  int64_t lanes;
  const int32_t *ends; /* one past each lane's last row */
} Lanes;

/* (lanes, n, m), laid out in any way: numbers, not bytes, from one to the next. */
typedef struct {
  const bf16 *at;
  int64_t lane, row, column;
} Matrices;

/* What dropout leaves out of (rows, width); packed_dropout.py defines it. */
typedef struct {
  const int64_t *streams; /* (rows,) */
  int64_t key;
  const int16_t *rates; /* of each row, of 256; or NULL for `rate` */
  int32_t rate;
} Dropping;

INLINE int32_t limit_of(const Dropping *drop, int64_t row) {
  return drop->rates ? drop->rates[row] : drop->rate;
}

/* The random bytes of rows from `row` on, each `apart` from the last, a multiple of 8; none where
 * nothing is dropped. */
static void draw_rows(uint8_t *bytes, const Dropping *drop, int64_t row, int64_t rows,
                      int64_t apart) {
  for (int64_t m = 0; m < rows; m++)
    if (limit_of(drop, row + m))
      random_bytes((uint64_t *)(bytes + m * apart), (uint64_t)drop->streams[row + m],
                   (uint64_t)drop->key, apart / 8);
}

/* out (rows, apart) = rows of x from `row` on, where kept; columns beyond x's are left alone. */
static void drop_rows(bf16 *out, uint8_t *bytes, const Dropping *drop, const bf16 *x, int64_t x_row,
                      int64_t row, int64_t rows, int64_t columns, int64_t apart) {
  draw_rows(bytes, drop, row, rows, apart);
  for (int64_t m = 0; m < rows; m++) {
    int32_t limit = limit_of(drop, row + m);
    __m256i limits = _mm256_set1_epi8((char)limit);
    for (int64_t c = 0; c < columns; c += 32) {
      __mmask32 there = columns - c >= 32 ? 0xFFFFFFFFu : (1u << (columns - c)) - 1;
      __m256i byte = _mm256_loadu_si256((const __m256i *)(bytes + m * apart + c));
      __mmask32 kept = limit ? _mm256_cmpge_epu8_mask(byte, limits) : 0xFFFFFFFFu;
      __m512i found = _mm512_maskz_loadu_epi16(there & kept, x + (row + m) * x_row + c);
      _mm512_mask_storeu_epi16(out + m * apart + c, there, found);
    }
  }
}

/* Which of 32 columns from `column` on, a multiple of 32, are kept of two rows: the first's are the
 * low bits. seeds: scrambled streams of each, four times. */
INLINE __mmask64 kept_of_two(longs seeds, __m512i limits, int64_t column) {
  const longs counter = {1, 2, 3, 4, 1, 2, 3, 4};
  longs word = (counter + (uint64_t)(column / 8)) * WEYL + seeds;
  SCRAMBLE(word)
  return _mm512_cmpge_epu8_mask((__m512i)word, limits);
}

/* One lane's matrix, (depth, columns), as [columns / 32][depth / 2][32] pairs, with zeros beyond its
 * last column. depth is even. */
static void lay_out_pairs(uint32_t *out, Matrices w, int64_t lane, int64_t depth,
                          int64_t columns) {
  const bf16 *from = w.at + lane * w.lane;
  for (int64_t c = 0; c < columns; c += 16) {
    uint32_t *to = out + c / COLUMNS * (depth / 2 * COLUMNS) + c % COLUMNS;
    __mmask16 there = first_of_16(columns - c);
    if (w.column == 1) {
      for (int64_t d = 0; d < depth; d += 2, to += COLUMNS) {
        const bf16 *at = from + d * w.row + c;
        __m512i pairs = in_pairs(load_halves(there, at), load_halves(there, at + w.row));
        _mm512_storeu_si512(to, pairs);
      }
    } else { /* a pair lies side by side: w.row is 1 */
      __m512i place = _mm512_mullo_epi32(
          _mm512_set1_epi32((int32_t)w.column),
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      for (int64_t d = 0; d < depth; d += 2, to += COLUMNS) {
        const bf16 *at = from + c * w.column + d;
        __m512i pairs =
            _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, place, at, sizeof(bf16));
        _mm512_storeu_si512(to, pairs);
      }
    }
  }
  if (columns % COLUMNS && columns % COLUMNS <= 16) { /* the other half of the last tile */
    uint32_t *to = out + columns / COLUMNS * (depth / 2 * COLUMNS) + 16;
    for (int64_t d = 0; d < depth; d += 2, to += COLUMNS)
      _mm512_storeu_si512(to, _mm512_setzero_si512());
  }
}

typedef struct {
  bf16 *out; /* (rows, columns) */
  int64_t out_row;
  const bf16 *x; /* (rows, depth) */
  int64_t x_row;
  const float *scale; /* of each row; or NULL */
  int add;            /* to what is in out */
  int64_t depth, columns;
  const Dropping *of_x, *of_product; /* or NULL; of the product before it is added */
  /* How much of each lane's matrix isn't 0, (lanes,); or NULL for all. */
  const int32_t *depths, *widths;
} Product;

/* Product of one lane: what there is to be multiplied. */
typedef struct {
  int64_t depth, columns;
} Extent;

INLINE Extent extent_of(const Product *p, int64_t lane) {
  int64_t depth = p->depths ? rounded_up(p->depths[lane], 2) : p->depth;
  return (Extent){depth, p->widths ? p->widths[lane] : p->columns};
}

/* What a thread works on. */
typedef struct {
  uint32_t *pairs;   /* of the lane's matrix */
  bf16 *dropped;     /* (ROWS, apart) */
  uint8_t *bytes;    /* (ROWS, apart): random ones, of x or of the product */
  int64_t apart;
  void *memory;
} Bench;

static int bench_made(Bench *b, const Product *p) {
  int64_t tiles = (p->columns + COLUMNS - 1) / COLUMNS;
  int64_t pairs = rounded_up(tiles * p->depth / 2 * COLUMNS * 4, 64);
  int64_t widest = p->depth > p->columns ? p->depth : p->columns;
  b->apart = p->of_x || p->of_product ? rounded_up(widest, 64) : 0;
  b->memory = aligned_alloc(64, (size_t)(pairs + 3 * ROWS * b->apart));
  if (!b->memory) return 0;
  b->pairs = b->memory;
  b->dropped = (bf16 *)((char *)b->memory + pairs);
  b->bytes = (uint8_t *)(b->dropped + ROWS * b->apart);
  return 1;
}

/* Eight rows (of the last ones fewer are kept) by up to 32 columns. at_x: the first of them in x. */
INLINE void tile(const Product *p, const Bench *b, const uint32_t *pairs, const bf16 *at_x,
                 int64_t x_row, int64_t row, int64_t rows, int64_t depth, int64_t column,
                 const int vectors) {
  __m512 sum[ROWS][2];
  const bf16 *x[ROWS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    x[m] = at_x + (m < rows ? m : rows - 1) * x_row;
    sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < depth; d += 2, pairs += COLUMNS) {
    __m512i first = _mm512_loadu_si512(pairs), second = _mm512_loadu_si512(pairs + 16);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      uint32_t both;
      memcpy(&both, x[m] + d, 4);
      __m512i spread_out = _mm512_set1_epi32((int32_t)both);
      sum[m][0] = product_of_pairs(sum[m][0], spread_out, first);
      if (vectors == 2) sum[m][1] = product_of_pairs(sum[m][1], spread_out, second);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    if (m >= rows) break;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
      __mmask16 there = first_of_16(p->columns - column - 16 * v);
      bf16 *at = p->out + (row + m) * p->out_row + column + 16 * v;
      __m512 found = sum[m][v];
      if (p->scale) found = _mm512_mul_ps(found, _mm512_set1_ps(p->scale[row + m]));
      if (p->of_product) {
        int32_t limit = limit_of(p->of_product, row + m);
        const uint8_t *byte = b->bytes + m * b->apart + column + 16 * v;
        __mmask16 kept = _mm_cmpge_epu8_mask(_mm_loadu_si128((const __m128i *)byte),
                                             _mm_set1_epi8((char)limit));
        if (limit) found = _mm512_maskz_mov_ps(kept, found);
      }
      if (p->add) found = _mm512_add_ps(found, widened(load_halves(there, at)));
      store_halves(at, there, found);
    }
  }
}

static int64_t first_row(const Lanes *lanes, int64_t lane) {
  return lane ? lanes->ends[lane - 1] : 0;
}

/* One thread for one piece of work, else all: OpenMP ends the threads that a smaller team leaves
 * out, and must start them again for the next larger one. */
static int team(int threads, int64_t pieces) { return pieces > 1 ? threads : 1; }

static int64_t longest_of(const Lanes *lanes) {
  int64_t longest = 0;
  for (int64_t lane = 0; lane < lanes->lanes; lane++) {
    int64_t rows = lanes->ends[lane] - first_row(lanes, lane);
    if (rows > longest) longest = rows;
  }
  return longest;
}

/* Eight rows of a lane, or the fewer that are left, by all columns. */
INLINE void product_of_rows(const Product *p, const Bench *b, Extent of, int64_t row,
                            int64_t rows) {
  const bf16 *x = p->x + row * p->x_row;
  int64_t x_row = p->x_row;
  if (p->of_x) {
    drop_rows(b->dropped, b->bytes, p->of_x, p->x, p->x_row, row, rows, p->depth, b->apart);
    x = b->dropped;
    x_row = b->apart;
  }
  if (p->of_product) draw_rows(b->bytes, p->of_product, row, rows, b->apart);
  for (int64_t column = 0; column < of.columns; column += COLUMNS) {
    const uint32_t *pairs = b->pairs + column / COLUMNS * (of.depth / 2 * COLUMNS);
    if (of.columns - column > 16)
      tile(p, b, pairs, x, x_row, row, rows, of.depth, column, 2);
    else
      tile(p, b, pairs, x, x_row, row, rows, of.depth, column, 1);
  }
  int64_t written = rounded_up(of.columns, 16);
  if (written < p->columns && !p->add)
    for (int64_t m = 0; m < rows; m++)
      memset(p->out + (row + m) * p->out_row + written, 0,
             (size_t)(p->columns - written) * sizeof(bf16));
}

/* out = scale * (x @ w[lane]) for each lane's rows, or added to out. 0 where memory is lacking.
 * w: (lanes, depth, columns); depth is even, and w's rows or its columns lie side by side. */
int lane_product_bf16(const Product *p, const Matrices *w, const Lanes *lanes, int threads) {
  int done = 1;
  int64_t parts = (longest_of(lanes) + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  threads = team(threads, lanes->lanes * parts);
#pragma omp parallel num_threads(threads) reduction(&& : done)
  {
    Bench b = {0}; /* of threads that have anything to do */
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < lanes->lanes * parts; unit++) {
      int64_t lane = unit / parts, end = lanes->ends[lane];
      int64_t row = first_row(lanes, lane) + unit % parts * ROWS_AT_ONCE;
      if (!done || row >= end) continue;
      if (!b.memory) done = bench_made(&b, p);
      if (!done) continue;
      if (end > row + ROWS_AT_ONCE) end = row + ROWS_AT_ONCE;
      Extent of = extent_of(p, lane);
      lay_out_pairs(b.pairs, *w, lane, of.depth, of.columns);
      for (; row < end; row += ROWS)
        product_of_rows(p, &b, of, row, end - row < ROWS ? end - row : ROWS);
    }
    free(b.memory);
  }
  return done;
}

typedef struct {
  float *out;       /* (lanes, narrow, wide) */
  const bf16 *left; /* (rows, narrow) */
  int64_t left_row, narrow;
  const bf16 *right; /* (rows, wide) */
  int64_t right_row, wide;
  const Dropping *of_right; /* or NULL */
  const int32_t *narrows;   /* how many of each lane's left columns aren't 0; or NULL for all */
} Outer;

/* Up to 32 columns of rows first to end, where kept, two rows in a pair; zeros beside the last of an
 * odd number and beyond the last column. drop: or NULL. */
INLINE void lay_out_rows(uint32_t *out, const bf16 *x, int64_t x_row, int64_t first, int64_t end,
                         int64_t column, int64_t columns, const Dropping *drop) {
  __mmask16 there[2] = {first_of_16(columns - column), first_of_16(columns - column - 16)};
  for (int64_t row = first; row < end; row += 2) {
    int64_t second = row + 1 < end ? row + 1 : row;
    __mmask64 kept = ~(__mmask64)0;
    if (drop) {
      uint64_t a = scrambled((uint64_t)(drop->streams[row] ^ drop->key));
      uint64_t b = scrambled((uint64_t)(drop->streams[second] ^ drop->key));
      __m256i low = _mm256_set1_epi8((char)limit_of(drop, row));
      __m256i high = _mm256_set1_epi8((char)limit_of(drop, second));
      kept = kept_of_two((longs){a, a, a, a, b, b, b, b},
                         _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), column);
    }
    for (int v = 0; v < 2; v++, out += 16) {
      const bf16 *at = x + row * x_row + column + 16 * v;
      __mmask16 of_first = there[v] & (__mmask16)(kept >> 16 * v);
      __mmask16 of_second = there[v] & (__mmask16)(kept >> (32 + 16 * v));
      if (second == row) of_second = 0;
      _mm512_storeu_si512(out, in_pairs(_mm256_maskz_loadu_epi16(of_first, at),
                                        _mm256_maskz_loadu_epi16(of_second, at + x_row)));
    }
  }
}

/* Eight of the narrow columns by 32 of the wide ones, summed over all pairs of rows. */
INLINE void outer_tile(__m512 sum[ROWS][2], const uint32_t *narrow, const uint32_t *wide,
                       int64_t pairs) {
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; pair++, narrow += COLUMNS, wide += COLUMNS) {
    __m512i first = _mm512_loadu_si512(wide), second = _mm512_loadu_si512(wide + 16);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      __m512i spread_out = _mm512_set1_epi32((int32_t)narrow[m]);
      sum[m][0] = product_of_pairs(sum[m][0], spread_out, first);
      sum[m][1] = product_of_pairs(sum[m][1], spread_out, second);
    }
  }
}

/* out[lane] = left[rows of lane]' @ right[rows of lane], 0 for a lane without rows. 0 where memory is
 * lacking. */
int lane_outer_bf16(const Outer *o, const Lanes *lanes, int threads) {
  int done = 1;
  int64_t wide_tiles = (o->wide + COLUMNS - 1) / COLUMNS;
  int64_t narrow_tiles = (o->narrow + COLUMNS - 1) / COLUMNS;
  /* A thread takes a lane and some of its wide columns: the narrow ones are laid out for each. */
  int64_t parts = threads < wide_tiles ? threads : wide_tiles;
  int64_t tile_size = (longest_of(lanes) + 1) / 2 * COLUMNS;
  threads = team(threads, lanes->lanes * parts);
#pragma omp parallel num_threads(threads) reduction(&& : done)
  {
    uint32_t *scratch = NULL; /* of threads that have anything to do */
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < lanes->lanes * parts; unit++) {
      int64_t lane = unit / parts, part = unit % parts;
      int64_t first = first_row(lanes, lane), end = lanes->ends[lane];
      int64_t pairs = (end - first + 1) / 2;
      if (!done) continue;
      if (!scratch)
        scratch = aligned_alloc(64, (size_t)((narrow_tiles + 1) * tile_size + COLUMNS) * 4);
      done = scratch != NULL;
      if (!done) continue;
      uint32_t *wide = scratch + narrow_tiles * tile_size;
      int64_t narrow = o->narrows ? o->narrows[lane] : o->narrow;
      for (int64_t t = 0; t * COLUMNS < narrow; t++)
        lay_out_rows(scratch + t * tile_size, o->left, o->left_row, first, end, t * COLUMNS,
                     o->narrow, NULL);
      for (int64_t t = wide_tiles * part / parts; t < wide_tiles * (part + 1) / parts; t++) {
        lay_out_rows(wide, o->right, o->right_row, first, end, t * COLUMNS, o->wide, o->of_right);
        for (int64_t n = 0; n < o->narrow; n += ROWS) {
          __m512 sum[ROWS][2];
          outer_tile(sum, scratch + n / COLUMNS * tile_size + n % COLUMNS, wide,
                     n < narrow ? pairs : 0);
          for (int m = 0; m < ROWS && n + m < o->narrow; m++)
            for (int v = 0; v < 2; v++) {
              int64_t column = t * COLUMNS + 16 * v;
              float *at = o->out + (lane * o->narrow + n + m) * o->wide + column;
              _mm512_mask_storeu_ps(at, first_of_16(o->wide - column), sum[m][v]);
            }
        }
      }
    }
    free(scratch);
  }
  return done;
}

int lane_products_there(void) { return 1; }
#else
int lane_products_there(void) { return 0; }
#endif
