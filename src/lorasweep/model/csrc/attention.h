/* Attention inside short rows; packed_attention.py defines it. */

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
