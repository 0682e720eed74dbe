/* The packed engine's own loops on a CPU: keyed dropout, and attention inside short rows.
 *
 * Compiled for the machine at hand by model/kernel_build.py; model/kernels.py calls them. What
 * they compute is defined by packed_dropout.py and packed_attention.py, which do the same with
 * torch where there is no compiler; tests hold the two to each other.
 *
 * Every loop runs over rows or tokens, and no number of one row ever meets one of another, so a
 * NaN stays in its trial. No option may let the compiler assume that there are no NaNs.
 *
 * The file includes itself once for each type of activations: float, and bfloat16 as bits.
 */
#ifndef SCALAR

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
/* Sixteen numbers that the compiler keeps in as many registers as the machine needs. */
typedef float lanes16 __attribute__((vector_size(64), aligned(64)));

#define WEYL 0x9E3779B97F4A7C15ull
#define QUERIES 4 /* that share one pass over keys and values */

static inline float widen_float(float x) { return x; }
static inline float narrow_float(float x) { return x; }

static inline float widen_bf16(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static inline bf16 narrow_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bf16)(x != x ? 0x7FC0u : rounded);
}

/* exp with an error of about one unit in the last place; 0 below float's range. */
static inline float fast_exp(float x) {
  float low = x < -87.0f ? -87.0f : x; /* a NaN stays one */
  float n = rintf(low * 1.44269504f);
  float r = low - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return x < -87.0f ? 0.0f : p * scale;
}

/* SplitMix64's finaliser, as in packed_dropout.py. */
static inline uint64_t scrambled(uint64_t state) {
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
  return state ^ (state >> 31);
}

/* Random bytes of one stream; `words` of eight bytes each. */
static inline void random_bytes(uint64_t *bytes, uint64_t stream, uint64_t key, int64_t words) {
  uint64_t state = scrambled(stream ^ key);
  for (int64_t w = 0; w < words; w++) bytes[w] = scrambled(state + (uint64_t)(w + 1) * WEYL);
}

static inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

/* Scratch memory of one thread: float arrays of a row and head, widths rounded up. */
typedef struct {
  int64_t keys, wide;
  float *key_columns, *value_columns; /* (wide, keys) */
  float *key, *value, *key_gradient, *value_gradient; /* (keys, wide) */
  float *query, *out; /* (QUERIES, wide) */
  float *weight, *gradient, *kept; /* (QUERIES, keys) */
  uint64_t *bytes;
  void *whole;
} Scratch;

static int scratch_made(Scratch *s, int64_t longest, int64_t width) {
  s->keys = rounded_up(longest, 16);
  s->wide = rounded_up(width, 16);
  int64_t grid = s->keys * s->wide, block = QUERIES * s->wide, row = QUERIES * s->keys;
  int64_t floats = 6 * grid + 2 * block + 3 * row;
  s->whole = aligned_alloc(64, rounded_up(floats * 4 + s->keys, 64));
  if (!s->whole) return 0;
  float *at = s->whole;
  float **grids[] = {&s->key_columns, &s->value_columns, &s->key,
                     &s->value, &s->key_gradient, &s->value_gradient};
  for (int i = 0; i < 6; i++, at += grid) *grids[i] = at;
  float **blocks[] = {&s->query, &s->out};
  for (int i = 0; i < 2; i++, at += block) *blocks[i] = at;
  float **rows[] = {&s->weight, &s->gradient, &s->kept};
  for (int i = 0; i < 3; i++, at += row) *rows[i] = at;
  s->bytes = (uint64_t *)at;
  return 1;
}

static inline int64_t longest_row(const Rows *rows) {
  int64_t longest = 1;
  for (int64_t r = 0; r < rows->rows; r++)
    longest = rows->length[r] > longest ? rows->length[r] : longest;
  return longest;
}

/* weights[b] = rows[b] . columns, for QUERIES rows at once: (QUERIES, keys). */
static inline void times_columns(float *restrict to, const float *restrict rows,
                                 const float *restrict columns, int64_t keys, int64_t wide,
                                 int64_t width, int64_t stride) {
  for (int64_t j = 0; j < keys; j += 16) {
    lanes16 sum[QUERIES] = {0};
    for (int64_t d = 0; d < width; d++) {
      lanes16 column = *(const lanes16 *)(columns + d * stride + j);
      for (int b = 0; b < QUERIES; b++) sum[b] += rows[b * wide + d] * column;
    }
    for (int b = 0; b < QUERIES; b++) *(lanes16 *)(to + b * stride + j) = sum[b];
  }
}

/* to[b] = sum over keys of weight[b] times rows: (QUERIES, wide). */
static inline void weighted_rows(float *restrict to, const float *restrict weight,
                                 const float *restrict rows, int64_t length, int64_t wide,
                                 int64_t stride) {
  for (int64_t d = 0; d < wide; d += 16) {
    lanes16 sum[QUERIES] = {0};
    for (int64_t j = 0; j < length; j++) {
      lanes16 row = *(const lanes16 *)(rows + j * wide + d);
      for (int b = 0; b < QUERIES; b++) sum[b] += weight[b * stride + j] * row;
    }
    for (int b = 0; b < QUERIES; b++) *(lanes16 *)(to + b * wide + d) = sum[b];
  }
}

/* to[j] += sum over queries of weight[b][j] times rows[b]: (keys, wide). */
static inline void add_outer(float *restrict to, const float *restrict weight,
                             const float *restrict rows, int64_t length, int64_t wide,
                             int64_t stride) {
  for (int64_t d = 0; d < wide; d += 16) {
    lanes16 row[QUERIES];
    for (int b = 0; b < QUERIES; b++) row[b] = *(const lanes16 *)(rows + b * wide + d);
    for (int64_t j = 0; j < length; j++) {
      lanes16 sum = *(lanes16 *)(to + j * wide + d);
      for (int b = 0; b < QUERIES; b++) sum += weight[b * stride + j] * row[b];
      *(lanes16 *)(to + j * wide + d) = sum;
    }
  }
}

static inline void transpose(float *restrict to, const float *restrict from, int64_t length,
                             int64_t keys, int64_t wide, int64_t width, int64_t stride) {
  for (int64_t d = 0; d < width; d++)
    for (int64_t j = 0; j < keys; j++) to[d * stride + j] = j < length ? from[j * wide + d] : 0.0f;
}

/* What of a query is kept of each key, times dropout's scale; `keys` is a multiple of 16. */
static inline void attention_kept(float *restrict kept, uint64_t *bytes, const Attending *how,
                                  int64_t token, int64_t head, int64_t keys) {
  uint64_t stream = (uint64_t)how->streams[token] * (uint64_t)(2 * head + 1);
  random_bytes(bytes, stream, (uint64_t)how->key, keys / 8);
  const uint8_t *byte = (const uint8_t *)bytes;
  float scale = 256.0f / (256.0f - (float)how->rate);
  for (int64_t j = 0; j < keys; j++) kept[j] = byte[j] >= how->rate ? scale : 0.0f;
}

static inline int unseen(const Attending *how, int64_t i, int64_t j) {
  return how->window && (i - j >= how->window || j - i >= how->window);
}

/* Softmax of one query's scores in place, 0 beyond the row; returns the logarithm of its sum.
 *
 * Loops run to `keys`, a multiple of 16, and not to `length`: what is left over after whole
 * vectors would be done one by one, and takes longer than all the rest. */
static inline float softmax(float *restrict score, const Attending *how, int64_t i,
                            int64_t length, int64_t keys) {
  for (int64_t j = length; j < keys; j++) score[j] = -INFINITY;
  if (how->window)
    for (int64_t j = 0; j < length; j++) score[j] = unseen(how, i, j) ? -INFINITY : score[j];
  float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < keys; j++) most = score[j] > most ? score[j] : most;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < keys; j++) {
    score[j] = fast_exp((score[j] - most) * how->scaling);
    sum += score[j];
  }
  float share = 1.0f / sum;
  for (int64_t j = 0; j < keys; j++) score[j] *= share;
  return most * how->scaling + logf(sum);
}

#define SCALAR float
#define NAMED(name) name##_float
#define WIDEN widen_float
#define NARROW narrow_float
#include "kernels.c"
#undef SCALAR
#undef NAMED
#undef WIDEN
#undef NARROW
#define SCALAR bf16
#define NAMED(name) name##_bf16
#define WIDEN widen_bf16
#define NARROW narrow_bf16
#include "kernels.c"

#else

/* out = x where kept, times scale; out may be x. x, out: (entries, width). rates: of each
 * entry, of 256; or NULL for `rate`. */
void NAMED(drop)(SCALAR *out, const SCALAR *x, int64_t entries, int64_t width,
                 const int64_t *streams, int64_t key, const int16_t *rates, int32_t rate,
                 float scale, int threads) {
  int64_t words = (width + 7) / 8;
#pragma omp parallel num_threads(threads)
  {
    uint64_t bytes[words];
    const uint8_t *byte = (const uint8_t *)bytes;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < entries; t++) {
      const SCALAR *from = x + t * width;
      SCALAR *to = out + t * width;
      int32_t limit = rates ? rates[t] : rate;
      if (limit == 0 && scale == 1.0f) {
        if (to != from) memcpy(to, from, (size_t)width * sizeof(SCALAR));
        continue;
      }
      random_bytes(bytes, (uint64_t)streams[t], (uint64_t)key, words);
      if (scale == 1.0f)
        for (int64_t c = 0; c < width; c++) to[c] = byte[c] >= limit ? from[c] : (SCALAR)0;
      else
        for (int64_t c = 0; c < width; c++)
          to[c] = byte[c] >= limit ? NARROW(WIDEN(from[c]) * scale) : (SCALAR)0;
    }
  }
}

static inline void NAMED(take)(float *restrict to, const SCALAR *restrict from, int64_t rows,
                               int64_t row_stride, int64_t width, int64_t wide) {
  for (int64_t j = 0; j < rows; j++) {
    for (int64_t d = 0; d < width; d++) to[j * wide + d] = WIDEN(from[j * row_stride + d]);
    for (int64_t d = width; d < wide; d++) to[j * wide + d] = 0.0f;
  }
}

/* Keys and values of a row and head, and the keys' columns. */
static inline void NAMED(take_row)(Scratch *s, const SCALAR *key, const SCALAR *value,
                                   const int64_t *strides, int64_t first, int64_t length,
                                   int64_t head, int64_t width) {
  const SCALAR *from_key = key + first * strides[2] + head * strides[3];
  const SCALAR *from_value = value + first * strides[4] + head * strides[5];
  NAMED(take)(s->key, from_key, length, strides[2], width, s->wide);
  NAMED(take)(s->value, from_value, length, strides[4], width, s->wide);
  transpose(s->key_columns, s->key, length, rounded_up(length, 16), s->wide, width, s->keys);
}

/* Queries start .. start + QUERIES of a row; those beyond its last are zero. */
static inline void NAMED(take_queries)(float *restrict to, const SCALAR *restrict from,
                                       int64_t count, int64_t row_stride, int64_t width,
                                       int64_t wide) {
  if (count < QUERIES) memset(to, 0, (size_t)(QUERIES * wide) * 4);
  NAMED(take)(to, from, count < QUERIES ? count : QUERIES, row_stride, width, wide);
}

/* out, query: (queries, heads, width); key, value: (tokens, heads, width); sums: (queries,
 * heads), for the way back. strides: between tokens and between heads of query, key, value;
 * out is contiguous. Returns 0 when memory ran out. */
int NAMED(attend)(SCALAR *out, float *sums, const SCALAR *query, const SCALAR *key,
                  const SCALAR *value, const int64_t *strides, const Rows *rows,
                  const Attending *how, int threads) {
  int64_t heads = how->heads, width = how->width, longest = longest_row(rows);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    Scratch s;
    int there = scratch_made(&s, longest, width);
    if (!there) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 4) collapse(2)
    for (int64_t r = 0; r < rows->rows; r++)
      for (int64_t h = 0; h < heads; h++) {
        if (!there) continue;
        int64_t length = rows->length[r], first = rows->first[r], keys = rounded_up(length, 16);
        NAMED(take_row)(&s, key, value, strides, first, length, h, width);
        for (int64_t i = 0; i < rows->query_count[r]; i += QUERIES) {
          int64_t q = rows->query_first[r] + i, count = rows->query_count[r] - i;
          if (count > QUERIES) count = QUERIES;
          const SCALAR *asking = query + q * strides[0] + h * strides[1];
          NAMED(take_queries)(s.query, asking, count, strides[0], width, s.wide);
          times_columns(s.weight, s.query, s.key_columns, keys, s.wide, width, s.keys);
          for (int64_t b = 0; b < count; b++) {
            float *weight = s.weight + b * s.keys;
            sums[(q + b) * heads + h] = softmax(weight, how, i + b, length, keys);
            if (how->streams) {
              attention_kept(s.kept, s.bytes, how, first + i + b, h, keys);
              for (int64_t j = 0; j < keys; j++) weight[j] *= s.kept[j];
            }
          }
          weighted_rows(s.out, s.weight, s.value, length, s.wide, s.keys);
          for (int64_t b = 0; b < count; b++)
            for (int64_t d = 0; d < width; d++)
              out[((q + b) * heads + h) * width + d] = NARROW(s.out[b * s.wide + d]);
        }
      }
    if (there) free(s.whole);
  }
  return !failed;
}

/* Gradients of attend: query_gradient (queries, heads, width), key_gradient and
 * value_gradient (tokens, heads, width), each contiguous, as is grad; key_gradient may be NULL. */
int NAMED(attend_backward)(SCALAR *query_gradient, SCALAR *key_gradient, SCALAR *value_gradient,
                           const SCALAR *grad, const float *sums, const SCALAR *query,
                           const SCALAR *key, const SCALAR *value, const int64_t *strides,
                           const Rows *rows, const Attending *how, int threads) {
  int64_t heads = how->heads, width = how->width, longest = longest_row(rows);
  int64_t across = heads * width;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    Scratch s;
    int there = scratch_made(&s, longest, width);
    if (!there) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 4) collapse(2)
    for (int64_t r = 0; r < rows->rows; r++)
      for (int64_t h = 0; h < heads; h++) {
        if (!there) continue;
        int64_t length = rows->length[r], first = rows->first[r], keys = rounded_up(length, 16);
        NAMED(take_row)(&s, key, value, strides, first, length, h, width);
        transpose(s.value_columns, s.value, length, keys, s.wide, width, s.keys);
        memset(s.key_gradient, 0, (size_t)(length * s.wide) * 4);
        memset(s.value_gradient, 0, (size_t)(length * s.wide) * 4);
        for (int64_t i = 0; i < rows->query_count[r]; i += QUERIES) {
          int64_t q = rows->query_first[r] + i, count = rows->query_count[r] - i;
          if (count > QUERIES) count = QUERIES;
          const SCALAR *asking = query + q * strides[0] + h * strides[1];
          NAMED(take_queries)(s.query, asking, count, strides[0], width, s.wide);
          times_columns(s.weight, s.query, s.key_columns, keys, s.wide, width, s.keys);
          NAMED(take_queries)(s.out, grad + q * across + h * width, count, across, width, s.wide);
          times_columns(s.gradient, s.out, s.value_columns, keys, s.wide, width, s.keys);
          for (int64_t b = 0; b < QUERIES; b++) {
            float *weight = s.weight + b * s.keys, *gradient = s.gradient + b * s.keys;
            float *kept = s.kept + b * s.keys;
            if (b >= count) {
              memset(kept, 0, (size_t)keys * 4);
              memset(gradient, 0, (size_t)keys * 4);
              continue;
            }
            float sum = sums[(q + b) * heads + h], inner = 0.0f;
            for (int64_t j = 0; j < keys; j++)
              weight[j] = fast_exp(weight[j] * how->scaling - sum);
            for (int64_t j = length; j < keys; j++) weight[j] = 0.0f;
            if (how->window)
              for (int64_t j = 0; j < length; j++)
                weight[j] = unseen(how, i + b, j) ? 0.0f : weight[j];
            if (how->streams) {
              attention_kept(kept, s.bytes, how, first + i + b, h, keys);
              for (int64_t j = 0; j < keys; j++) gradient[j] *= kept[j];
              for (int64_t j = 0; j < keys; j++) kept[j] *= weight[j];
            } else {
              memcpy(kept, weight, (size_t)keys * 4);
            }
#pragma omp simd reduction(+ : inner)
            for (int64_t j = 0; j < keys; j++) inner += weight[j] * gradient[j];
            for (int64_t j = 0; j < keys; j++)
              gradient[j] = weight[j] * (gradient[j] - inner) * how->scaling;
          }
          add_outer(s.value_gradient, s.kept, s.out, length, s.wide, s.keys);
          if (key_gradient) add_outer(s.key_gradient, s.gradient, s.query, length, s.wide, s.keys);
          weighted_rows(s.out, s.gradient, s.key, length, s.wide, s.keys);
          for (int64_t b = 0; b < count; b++)
            for (int64_t d = 0; d < width; d++)
              query_gradient[((q + b) * heads + h) * width + d] = NARROW(s.out[b * s.wide + d]);
        }
        for (int64_t j = 0; j < length; j++)
          for (int64_t d = 0; d < width; d++) {
            int64_t at = ((first + j) * heads + h) * width + d;
            value_gradient[at] = NARROW(s.value_gradient[j * s.wide + d]);
            if (key_gradient) key_gradient[at] = NARROW(s.key_gradient[j * s.wide + d]);
          }
      }
    if (there) free(s.whole);
  }
  return !failed;
}

#endif
