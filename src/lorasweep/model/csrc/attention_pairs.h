/* Attention inside short rows, in bfloat16, for processors that multiply its pairs;
 * packed_attention.py defines it.
 *
 * Attention's weights and the gradients of its scores are rounded to bfloat16 before they are
 * multiplied; all sums, softmax and dropout are in float. `pairs` are two numbers of a row side by
 * side, or of two rows, in one word.
 */
#define BLOCK 64 /* queries whose weights are kept at once on the way back */

/* Scratch memory of one thread, for a row and head. keys: rounded up to 16. The way forth has
 * QUERIES in place of BLOCK. */
typedef struct {
  uint32_t *key_columns, *value_columns; /* (width / 2, keys): pairs inside a key */
  uint32_t *key_pairs, *value_pairs;     /* (keys / 2, wide): pairs of keys */
  uint32_t *query_pairs, *grad_pairs;    /* (BLOCK / 2, wide): pairs of queries */
  uint32_t *slope_columns, *weight_columns;      /* (BLOCK / 2, keys): pairs of queries */
  float *key_gradient, *value_gradient;  /* (keys, wide) */
  float *score, *slope;                  /* (QUERIES, keys) */
  bf16 *slopes, *weights;                /* (BLOCK, keys) */
  uint8_t *bytes;                        /* (QUERIES, keys rounded up to DRAWN) */
  void *memory;
} PairsScratch;

static int pairs_scratch_made(PairsScratch *s, int64_t longest, int64_t width, int back) {
  int64_t keys = rounded_up(longest, 16), wide = rounded_up(width, 16);
  int64_t columns = rounded_up(width / 2, 16) * keys, pairs = keys / 2 * wide;
  int64_t block = back ? BLOCK : QUERIES;
  int64_t of_queries = block / 2 * wide, of_weights = block / 2 * keys, rows = QUERIES * keys;
  struct {
    void *at;
    int64_t size; /* in words */
  } parts[] = {
      {&s->key_columns, columns},      {&s->value_columns, columns},
      {&s->key_pairs, pairs},          {&s->value_pairs, pairs},
      {&s->query_pairs, of_queries},   {&s->grad_pairs, of_queries},
      {&s->slope_columns, of_weights}, {&s->weight_columns, of_weights},
      {&s->key_gradient, 2 * pairs},   {&s->value_gradient, 2 * pairs},
      {&s->score, rows},               {&s->slope, rows},
      {&s->slopes, of_weights},        {&s->weights, of_weights},
      {&s->bytes, QUERIES * rounded_up(keys, DRAWN) / 4},
  };
  const int count = sizeof parts / sizeof *parts;
  int64_t words_of_all = 0;
  for (int i = 0; i < count; i++) words_of_all += rounded_up(parts[i].size, 16);
  char *at = s->memory = aligned_alloc(64, (size_t)words_of_all * 4);
  if (!at) return 0;
  for (int i = 0; i < count; i++) {
    memcpy(parts[i].at, &at, sizeof at);
    at += rounded_up(parts[i].size, 16) * 4;
  }
  return 1;
}

/* to (width / 2, keys) = pairs inside each of `rows` rows, transposed; zeros for rows beyond. The
 * next head's numbers mostly lie behind these: they are fetched meanwhile. */
INLINE void pairs_across(uint32_t *restrict to, const bf16 *from, int64_t stride, int64_t rows,
                         int64_t keys, int64_t width) {
  for (int64_t j = 0; j < keys; j += 16)
    for (int64_t d = 0; d < width / 2; d += 16) {
      __mmask16 there = first_of_16(width / 2 - d);
      floats square[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const bf16 *at = from + (j + i) * stride + 2 * d;
        if (j + i < rows) __builtin_prefetch(at + width);
        square[i] =
            (floats)_mm512_maskz_loadu_epi32(j + i < rows ? there : 0, j + i < rows ? at : from);
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        _mm512_storeu_ps((float *)to + (d + i) * keys + j, (__m512)square[i]);
    }
}

/* to (rows / 2, wide) = numbers of two rows side by side; zeros beside the last of an odd number. */
INLINE void pairs_along(uint32_t *restrict to, const bf16 *from, int64_t stride, int64_t rows,
                        int64_t width, int64_t wide) {
  for (int64_t j = 0; j < rows; j += 2)
    for (int64_t c = 0; c < width; c += 16) {
      __mmask16 there = first_of_16(width - c);
      const bf16 *at = from + j * stride + c;
      const bf16 *next = j + 1 < rows ? at + stride : at;
      __m512i pairs =
          in_pairs(load_halves(there, at), load_halves(j + 1 < rows ? there : 0, next));
      _mm512_storeu_si512(to + j / 2 * wide + c, pairs);
    }
}

INLINE __m512i spread_pair(const bf16 *at) {
  uint32_t both;
  memcpy(&both, at, 4);
  return _mm512_set1_epi32((int32_t)both);
}

/* sum (QUERIES, 16 or 32 columns) of rows' pairs times those of `right`, (pairs, across), from
 * column c on. */
INLINE void sum_pairs(__m512 sum[QUERIES][2], const bf16 *const rows[QUERIES],
                      const uint32_t *right, int64_t pairs, int64_t across, const int vectors) {
#pragma GCC unroll 4
  for (int b = 0; b < QUERIES; b++) sum[b][0] = sum[b][1] = _mm512_setzero_ps();
  for (int64_t d = 0; d < pairs; d++, right += across) {
    __m512i first = _mm512_loadu_si512(right);
    __m512i second = vectors == 2 ? _mm512_loadu_si512(right + 16) : first;
#pragma GCC unroll 4
    for (int b = 0; b < QUERIES; b++) {
      __m512i both = spread_pair(rows[b] + 2 * d);
      sum[b][0] = product_of_pairs(sum[b][0], both, first);
      if (vectors == 2) sum[b][1] = product_of_pairs(sum[b][1], both, second);
    }
  }
}

/* to (QUERIES, keys), floats, = rows times columns (pairs, keys). */
INLINE void scores_of(float *restrict to, const bf16 *const rows[QUERIES], const uint32_t *columns,
                      int64_t pairs, int64_t keys) {
  __m512 sum[QUERIES][2];
  for (int64_t c = 0; c < keys; c += 32) {
    const int both = keys - c > 16;
    if (both)
      sum_pairs(sum, rows, columns + c, pairs, keys, 2);
    else
      sum_pairs(sum, rows, columns + c, pairs, keys, 1);
#pragma GCC unroll 4
    for (int b = 0; b < QUERIES; b++) {
      _mm512_storeu_ps(to + b * keys + c, sum[b][0]);
      if (both) _mm512_storeu_ps(to + b * keys + c + 16, sum[b][1]);
    }
  }
}

/* Rows of to, `apart` from one another, `count` of them, = weights (QUERIES, keys) times rows in
 * pairs (keys / 2, wide). */
INLINE void weighted_sums(bf16 *to, int64_t apart, int64_t count, const bf16 *weights, int64_t keys,
                          const uint32_t *right, int64_t length, int64_t width, int64_t wide) {
  const bf16 *rows[QUERIES];
  for (int b = 0; b < QUERIES; b++) rows[b] = weights + b * keys;
  __m512 sum[QUERIES][2];
  for (int64_t c = 0; c < wide; c += 32) {
    const int vectors = wide - c > 16 ? 2 : 1;
    if (vectors == 2)
      sum_pairs(sum, rows, right + c, (length + 1) / 2, wide, 2);
    else
      sum_pairs(sum, rows, right + c, (length + 1) / 2, wide, 1);
    for (int b = 0; b < count; b++)
      for (int v = 0; v < vectors; v++)
        store_halves(to + b * apart + c + 16 * v, first_of_16(width - c - 16 * v), sum[b][v]);
  }
}

/* Eight keys by 16 or 32 columns of add_transposed. */
INLINE void add_tile(float *restrict to, const uint32_t *columns, const uint32_t *rows,
                     int64_t pairs, int64_t keys, int64_t wide, int fresh, const int vectors) {
  __m512 sum[8][2];
#pragma GCC unroll 8
  for (int m = 0; m < 8; m++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
      sum[m][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to + m * wide + 16 * v);
  for (int64_t i = 0; i < pairs; i++, columns += keys, rows += wide) {
    __m512i first = _mm512_loadu_si512(rows);
    __m512i second = vectors == 2 ? _mm512_loadu_si512(rows + 16) : first;
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++) {
      __m512i both = _mm512_set1_epi32((int32_t)columns[m]);
      sum[m][0] = product_of_pairs(sum[m][0], both, first);
      if (vectors == 2) sum[m][1] = product_of_pairs(sum[m][1], both, second);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < 8; m++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) _mm512_storeu_ps(to + m * wide + 16 * v, sum[m][v]);
}

/* to (keys, wide) += columns (pairs of queries, keys), transposed, times rows (the same pairs,
 * wide). Instead of added to, it is set if `fresh`. */
INLINE void add_transposed(float *restrict to, const uint32_t *columns, const uint32_t *rows,
                           int64_t pairs, int64_t length, int64_t keys, int64_t wide, int fresh) {
  for (int64_t j = 0; j < length; j += 8)
    for (int64_t c = 0; c < wide; c += 32) {
      float *at = to + j * wide + c;
      if (wide - c > 16)
        add_tile(at, columns + j, rows + c, pairs, keys, wide, fresh, 2);
      else
        add_tile(at, columns + j, rows + c, pairs, keys, wide, fresh, 1);
    }
}

/* to (rows, width) of one head, `apart` from one another, = from (rows, wide). */
INLINE void narrowed(bf16 *to, const float *from, int64_t rows, int64_t apart, int64_t width,
                     int64_t wide) {
  for (int64_t j = 0; j < rows; j++)
    for (int64_t c = 0; c < width; c += 16)
      store_halves(to + j * apart + c, first_of_16(width - c),
                   _mm512_loadu_ps(from + j * wide + c));
}

/* Which of 16 keys from j on query i sees. */
INLINE __mmask16 sees(const Attending *how, int64_t i, int64_t j, int64_t length) {
  if (!how->window) return first_of_16(length - j);
  return _mm512_movepi32_mask((__m512i)seen_from(how, i, j, length));
}

/* Which of 16 keys dropout keeps. */
INLINE __mmask16 keeps(const Attending *how, const uint8_t *bytes) {
  if (!how->streams) return 0xFFFF;
  return _mm_cmpge_epu8_mask(_mm_loadu_si128((const __m128i *)bytes),
                             _mm_set1_epi8((char)how->rate));
}

/* Weights (QUERIES, keys), softmax and dropout of the scores of queries from i on; sums: the
 * logarithms of softmax's sums. */
INLINE void weigh_pairs(bf16 *weights, float *sums, float *score, const uint8_t *bytes,
                        const Attending *how, int64_t i, int64_t length, int64_t keys) {
  floats most[QUERIES], sum[QUERIES];
  float largest[QUERIES], factor[QUERIES];
  for (int b = 0; b < QUERIES; b++) most[b] = spread(-INFINITY), sum[b] = spread(0.0f);
  for (int64_t j = 0; j < keys; j += 16)
#pragma GCC unroll 4
    for (int b = 0; b < QUERIES; b++) {
      __m512 x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), sees(how, i + b, j, length),
                                    _mm512_loadu_ps(score + b * keys + j));
      _mm512_storeu_ps(score + b * keys + j, x);
      most[b] = (floats)_mm512_max_ps((__m512)most[b], x);
    }
#pragma GCC unroll 4
  for (int b = 0; b < QUERIES; b++) largest[b] = _mm512_reduce_max_ps((__m512)most[b]);
  for (int64_t j = 0; j < keys; j += 16)
#pragma GCC unroll 4
    for (int b = 0; b < QUERIES; b++) {
      floats x = (floats)_mm512_loadu_ps(score + b * keys + j);
      x = exp_of((x - largest[b]) * how->scaling);
      _mm512_storeu_ps(score + b * keys + j, (__m512)x);
      sum[b] += x;
    }
#pragma GCC unroll 4
  for (int b = 0; b < QUERIES; b++) {
    float total = _mm512_reduce_add_ps((__m512)sum[b]);
    factor[b] = scale_kept(how) / total;
    sums[b] = largest[b] * how->scaling + logf(total);
  }
  for (int64_t j = 0; j < keys; j += 16)
#pragma GCC unroll 4
    for (int b = 0; b < QUERIES; b++) {
      __mmask16 kept = keeps(how, bytes + b * rounded_up(keys, DRAWN) + j);
      __m512 x = _mm512_loadu_ps(score + b * keys + j);
      x = _mm512_maskz_mul_ps(kept, x, _mm512_set1_ps(factor[b]));
      _mm256_storeu_si256((__m256i *)(weights + b * keys + j), (__m256i)_mm512_cvtneps_pbh(x));
    }
}

/* From scores and the gradients of weights (`slope`), of queries from i on: their weights after
 * dropout and the gradients of their scores, (QUERIES, keys) each. */
INLINE void weigh_pairs_backward(bf16 *weights, bf16 *slopes, float *score, float *slope,
                                 const float *sums, const uint8_t *bytes, const Attending *how,
                                 int64_t i, int64_t length, int64_t keys) {
  floats products[QUERIES];
  float inner[QUERIES];
  const __m512 scale = _mm512_set1_ps(scale_kept(how));
  for (int b = 0; b < QUERIES; b++) products[b] = spread(0.0f);
  for (int64_t j = 0; j < keys; j += 16)
#pragma GCC unroll 4
    for (int b = 0; b < QUERIES; b++) {
      float *of_score = score + b * keys + j, *of_slope = slope + b * keys + j;
      __mmask16 kept = keeps(how, bytes + b * rounded_up(keys, DRAWN) + j);
      floats share = exp_of((floats)_mm512_loadu_ps(of_score) * how->scaling - sums[b]);
      share = (floats)_mm512_maskz_mov_ps(sees(how, i + b, j, length), (__m512)share);
      floats gradient = (floats)_mm512_maskz_mul_ps(kept, _mm512_loadu_ps(of_slope), scale);
      __m512 weight = _mm512_maskz_mul_ps(kept, (__m512)share, scale);
      _mm256_storeu_si256((__m256i *)(weights + b * keys + j), (__m256i)_mm512_cvtneps_pbh(weight));
      _mm512_storeu_ps(of_score, (__m512)share);
      _mm512_storeu_ps(of_slope, (__m512)gradient);
      products[b] += share * gradient;
    }
#pragma GCC unroll 4
  for (int b = 0; b < QUERIES; b++) inner[b] = _mm512_reduce_add_ps((__m512)products[b]);
  for (int64_t j = 0; j < keys; j += 16)
#pragma GCC unroll 4
    for (int b = 0; b < QUERIES; b++) {
      floats share = (floats)_mm512_loadu_ps(score + b * keys + j);
      floats gradient = (floats)_mm512_loadu_ps(slope + b * keys + j);
      __m512 found = (__m512)(share * (gradient - inner[b]) * how->scaling);
      _mm256_storeu_si256((__m256i *)(slopes + b * keys + j), (__m256i)_mm512_cvtneps_pbh(found));
    }
}

/* Where QUERIES rows start; the last of `count` stands for those that aren't there. */
INLINE void rows_from(const bf16 *rows[QUERIES], const bf16 *first, int64_t apart, int64_t count) {
  for (int b = 0; b < QUERIES; b++) rows[b] = first + (b < count ? b : count - 1) * apart;
}

/* Row r and one head of attend. */
static void attend_pairs(PairsScratch *s, bf16 *out, float *sums, const Asked_bf16 *asked,
                         const Rows *rows, const Attending *how, int64_t r, int64_t head) {
  int64_t length = rows->length[r], first = rows->first[r];
  int64_t heads = how->heads, width = how->width;
  int64_t keys = rounded_up(length, 16), wide = rounded_up(width, 16);
  const int64_t *strides = asked->strides;
  fetch_forward_bf16(out, asked, rows, how, r + 1, head);
  pairs_across(s->key_columns, asked->key + first * strides[2] + head * strides[3], strides[2],
               length, keys, width);
  pairs_along(s->value_pairs, asked->value + first * strides[4] + head * strides[5], strides[4],
              length, width, wide);
  for (int64_t i = 0; i < rows->query_count[r]; i += QUERIES) {
    int64_t q = rows->query_first[r] + i, count = rows->query_count[r] - i;
    if (count > QUERIES) count = QUERIES;
    const bf16 *query[QUERIES];
    float found[QUERIES];
    rows_from(query, asked->query + q * strides[0] + head * strides[1], strides[0], count);
    if (how->streams) draw(s->bytes, how, first + i, count, head, keys);
    scores_of(s->score, query, s->key_columns, width / 2, keys);
    weigh_pairs(s->weights, found, s->score, s->bytes, how, i, length, keys);
    for (int64_t b = 0; b < count; b++) sums[(q + b) * heads + head] = found[b];
    weighted_sums(out + (q * heads + head) * width, heads * width, count, s->weights, keys,
                  s->value_pairs, length, width, wide);
  }
}

/* Row r and one head of attend_backward. */
static void attend_pairs_backward(PairsScratch *s, bf16 *query_gradient, bf16 *key_gradient,
                                  bf16 *value_gradient, const bf16 *grad, const float *sums,
                                  const Asked_bf16 *asked, const Rows *rows, const Attending *how,
                                  int64_t r, int64_t head) {
  int64_t length = rows->length[r], first = rows->first[r], queries = rows->query_count[r];
  int64_t heads = how->heads, width = how->width;
  int64_t keys = rounded_up(length, 16), wide = rounded_up(width, 16);
  int64_t across = heads * width, row_at = (first * heads + head) * width;
  const int64_t *strides = asked->strides;
  fetch_backward_bf16(query_gradient, key_gradient, value_gradient, grad, asked, rows, how, r + 1,
                      head);
  const bf16 *key = asked->key + first * strides[2] + head * strides[3];
  const bf16 *value = asked->value + first * strides[4] + head * strides[5];
  pairs_across(s->key_columns, key, strides[2], length, keys, width);
  pairs_across(s->value_columns, value, strides[4], length, keys, width);
  pairs_along(s->key_pairs, key, strides[2], length, width, wide);
  for (int64_t block = 0; block < queries; block += BLOCK) {
    int64_t end = queries - block < BLOCK ? queries : block + BLOCK, in_block = end - block;
    int64_t pairs = (in_block + 1) / 2, at = rows->query_first[r] + block;
    const bf16 *of_block = asked->query + at * strides[0] + head * strides[1];
    for (int64_t i = block; i < end; i += QUERIES) {
      int64_t q = rows->query_first[r] + i, count = end - i < QUERIES ? end - i : QUERIES;
      const bf16 *query[QUERIES], *slope[QUERIES];
      float of_query[QUERIES];
      rows_from(query, asked->query + q * strides[0] + head * strides[1], strides[0], count);
      rows_from(slope, grad + (q * heads + head) * width, across, count);
      for (int64_t b = 0; b < QUERIES; b++)
        of_query[b] = sums[(q + (b < count ? b : count - 1)) * heads + head];
      if (how->streams) draw(s->bytes, how, first + i, count, head, keys);
      scores_of(s->score, query, s->key_columns, width / 2, keys);
      scores_of(s->slope, slope, s->value_columns, width / 2, keys);
      bf16 *slopes = s->slopes + (i - block) * keys;
      weigh_pairs_backward(s->weights + (i - block) * keys, slopes, s->score, s->slope, of_query,
                           s->bytes, how, i, length, keys);
      weighted_sums(query_gradient + (q * heads + head) * width, across, count, slopes, keys,
                    s->key_pairs, length, width, wide);
    }
    pairs_along(s->weight_columns, s->weights, keys, in_block, keys, keys);
    pairs_along(s->grad_pairs, grad + (at * heads + head) * width, across, in_block, width, wide);
    add_transposed(s->value_gradient, s->weight_columns, s->grad_pairs, pairs, length, keys, wide,
                   block == 0);
    if (!key_gradient) continue;
    pairs_along(s->slope_columns, s->slopes, keys, in_block, keys, keys);
    pairs_along(s->query_pairs, of_block, strides[0], in_block, width, wide);
    add_transposed(s->key_gradient, s->slope_columns, s->query_pairs, pairs, length, keys, wide,
                   block == 0);
  }
  if (!queries) { /* nobody asked */
    memset(s->value_gradient, 0, (size_t)(length * wide) * 4);
    memset(s->key_gradient, 0, (size_t)(length * wide) * 4);
  }
  narrowed(value_gradient + row_at, s->value_gradient, length, across, width, wide);
  if (key_gradient) narrowed(key_gradient + row_at, s->key_gradient, length, across, width, wide);
}

/* As attend in attention.h, which does it where the width is odd: then there are no pairs. */
int attend_bf16(bf16 *out, float *sums, const bf16 *query, const bf16 *key, const bf16 *value,
                const int64_t *strides, const Rows *rows, const Attending *how, int threads) {
  if (how->width % 2)
    return attend_any_bf16(out, sums, query, key, value, strides, rows, how, threads);
  const Asked_bf16 asked = {query, key, value, strides};
  FOR_EACH_HEAD(PairsScratch, pairs_scratch_made(&s, longest, how->width, 0), attend_pairs, out,
                sums, &asked)
}

int attend_backward_bf16(bf16 *query_gradient, bf16 *key_gradient, bf16 *value_gradient,
                         const bf16 *grad, const float *sums, const bf16 *query, const bf16 *key,
                         const bf16 *value, const int64_t *strides, const Rows *rows,
                         const Attending *how, int threads) {
  if (how->width % 2)
    return attend_backward_any_bf16(query_gradient, key_gradient, value_gradient, grad, sums, query,
                                   key, value, strides, rows, how, threads);
  const Asked_bf16 asked = {query, key, value, strides};
  FOR_EACH_HEAD(PairsScratch, pairs_scratch_made(&s, longest, how->width, 1),
                attend_pairs_backward, query_gradient, key_gradient, value_gradient, grad, sums,
                &asked)
}
