/* Products of each lane's rows with its own narrow matrix, in bfloat16; grouped_products.py defines
 * them.
 *
 * LoRA's matrices are as narrow as its rank, so a product of a lane's few hundred rows is over
 * before a library has found out how to do it. Here the matrix is laid out once for a lane, in
 * pairs as the processor multiplies them, and stays in its nearest cache.
 *
 * A row's result depends on that row and its lane's matrix alone, and a lane's sums over its rows on
 * those rows alone, added from the first to the last: bit for bit, whoever else is there.
 */
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#include <immintrin.h>

#define COLUMNS 32 /* of a tile: two vectors of floats */
#define ROWS 8     /* of a tile: with two vectors each, sixteen sums at once */
#define ROWS_AT_ONCE 512 /* of a lane, for one thread */

typedef struct {
  int64_t lanes;
  const int32_t *ends; /* one past each lane's last row */
} Lanes;

/* (lanes, n, m), laid out in any way: numbers, not bytes, from one to the next. */
typedef struct {
  const bf16 *at;
  int64_t lane, row, column;
} Matrices;

INLINE __m512 widened(__m256i halves16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves16), 16));
}

INLINE __m512 product_of_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* Numbers of two rows side by side: a0 b0 a1 b1 ... */
INLINE __m512i in_pairs(__m256i a, __m256i b) {
  __m512i low = _mm512_cvtepu16_epi32(a), high = _mm512_cvtepu16_epi32(b);
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

INLINE __mmask16 first_of_16(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
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
        __m512i pairs = in_pairs(_mm256_maskz_loadu_epi16(there, at),
                                 _mm256_maskz_loadu_epi16(there, at + w.row));
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
} Product;

/* Eight rows (of the last ones fewer are kept) by up to 32 columns. */
INLINE void tile(const Product *p, const uint32_t *pairs, int64_t row, int64_t rows, int64_t column,
                 const int vectors) {
  __m512 sum[ROWS][2];
  const bf16 *x[ROWS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    x[m] = p->x + (row + (m < rows ? m : rows - 1)) * p->x_row;
    sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < p->depth; d += 2, pairs += COLUMNS) {
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
      if (p->add) found = _mm512_add_ps(found, widened(_mm256_maskz_loadu_epi16(there, at)));
      _mm256_mask_storeu_epi16(at, there, (__m256i)_mm512_cvtneps_pbh(found));
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

/* out = scale * (x @ w[lane]) for each lane's rows, or added to out. 0 where memory is lacking.
 * w: (lanes, depth, columns); depth is even, and w's rows or its columns lie side by side. */
int lane_product_bf16(const Product *p, const Matrices *w, const Lanes *lanes, int threads) {
  int done = 1;
  int64_t tiles = (p->columns + COLUMNS - 1) / COLUMNS;
  int64_t parts = (longest_of(lanes) + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  threads = team(threads, lanes->lanes * parts);
#pragma omp parallel num_threads(threads) reduction(&& : done)
  {
    uint32_t *pairs = NULL; /* of threads that have anything to do */
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < lanes->lanes * parts; unit++) {
      int64_t lane = unit / parts, end = lanes->ends[lane];
      int64_t row = first_row(lanes, lane) + unit % parts * ROWS_AT_ONCE;
      if (!done || row >= end) continue;
      if (!pairs) pairs = aligned_alloc(64, (size_t)(tiles * p->depth / 2 * COLUMNS * 4));
      done = pairs != NULL;
      if (!done) continue;
      if (end > row + ROWS_AT_ONCE) end = row + ROWS_AT_ONCE;
      lay_out_pairs(pairs, *w, lane, p->depth, p->columns);
      for (; row < end; row += ROWS) {
        int64_t rows = end - row < ROWS ? end - row : ROWS;
        for (int64_t t = 0; t < tiles; t++) {
          const uint32_t *of_tile = pairs + t * (p->depth / 2 * COLUMNS);
          if (p->columns - t * COLUMNS > 16)
            tile(p, of_tile, row, rows, t * COLUMNS, 2);
          else
            tile(p, of_tile, row, rows, t * COLUMNS, 1);
        }
      }
    }
    free(pairs);
  }
  return done;
}

typedef struct {
  float *out;       /* (lanes, narrow, wide) */
  const bf16 *left; /* (rows, narrow) */
  int64_t left_row, narrow;
  const bf16 *right; /* (rows, wide) */
  int64_t right_row, wide;
} Outer;

/* Up to 32 columns of rows first to end, two rows in a pair; zeros beside the last of an odd
 * number and beyond the last column. */
static void lay_out_rows(uint32_t *out, const bf16 *x, int64_t x_row, int64_t first, int64_t end,
                         int64_t column, int64_t columns) {
  __mmask16 there[2] = {first_of_16(columns - column), first_of_16(columns - column - 16)};
  for (int64_t row = first; row < end; row += 2)
    for (int v = 0; v < 2; v++, out += 16) {
      const bf16 *at = x + row * x_row + column + 16 * v;
      __mmask16 of_second = row + 1 < end ? there[v] : 0;
      _mm512_storeu_si512(out, in_pairs(_mm256_maskz_loadu_epi16(there[v], at),
                                        _mm256_maskz_loadu_epi16(of_second, at + x_row)));
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
      for (int64_t t = 0; t < narrow_tiles; t++)
        lay_out_rows(scratch + t * tile_size, o->left, o->left_row, first, end, t * COLUMNS,
                     o->narrow);
      for (int64_t t = wide_tiles * part / parts; t < wide_tiles * (part + 1) / parts; t++) {
        lay_out_rows(wide, o->right, o->right_row, first, end, t * COLUMNS, o->wide);
        for (int64_t n = 0; n < o->narrow; n += ROWS) {
          __m512 sum[ROWS][2];
          outer_tile(sum, scratch + n / COLUMNS * tile_size + n % COLUMNS, wide, pairs);
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
