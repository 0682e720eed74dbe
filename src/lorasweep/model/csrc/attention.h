/* Attention inside short rows; packed_attention.py defines it. */

typedef struct {
  const SCALAR *query, *key, *value;
  const int64_t *strides; /* between tokens and between heads of query, key, value */
} NAMED(Asked);

/* Widen (rows, width) of one head to (rows rounded up to `multiple`, width rounded up), with zeros
 * where there is no number. The next head's mostly lie behind it: they are fetched meanwhile. */
INLINE void NAMED(take)(float *restrict to, const SCALAR *restrict from, int64_t rows,
                        int64_t multiple, int64_t row_stride, int64_t width, int64_t wide) {
  for (int64_t j = 0; j < rows; j++)
    for (int64_t d = 0; d < wide; d += LANES) {
      const SCALAR *at = from + j * row_stride + d;
      __builtin_prefetch(at + width);
      SCALAR some[LANES] = {0};
      if (d + LANES > width) at = memcpy(some, at, (size_t)(width - d) * sizeof(SCALAR));
      *vector(to + j * wide + d) = NAMED(load)(at);
    }
  int64_t missing = rounded_up(rows, multiple) - rows;
  memset(to + rows * wide, 0, (size_t)(missing * wide) * 4);
}

INLINE void NAMED(give)(SCALAR *restrict to, float *restrict from, int64_t rows,
                        int64_t row_stride, int64_t width, int64_t wide) {
  for (int64_t j = 0; j < rows; j++)
    for (int64_t d = 0; d < width; d += LANES) {
      SCALAR *at = to + j * row_stride + d, some[LANES];
      int partly = d + LANES > width;
      NAMED(store)(partly ? some : at, *vector(from + j * wide + d));
      if (partly) memcpy(at, some, (size_t)(width - d) * sizeof(SCALAR));
    }
}

/* Keys and values of row r and a head, and the keys' columns. */
INLINE void NAMED(take_row)(Scratch *s, const NAMED(Asked) *asked, const Rows *rows, int64_t r,
                            int64_t head, int64_t width, int64_t wide) {
  int64_t first = rows->first[r], length = rows->length[r];
  const int64_t *strides = asked->strides;
  const SCALAR *key = asked->key + first * strides[2] + head * strides[3];
  const SCALAR *value = asked->value + first * strides[4] + head * strides[5];
  NAMED(take)(s->key, key, length, LANES, strides[2], width, wide);
  NAMED(take)(s->value, value, length, LANES, strides[4], width, wide);
  transposed(s->key_columns, s->key, rounded_up(length, LANES), wide);
}

INLINE void NAMED(fetch_tokens)(const SCALAR *from, int64_t first, int64_t count, int64_t token,
                                int64_t head, int64_t of_head, int64_t width, const int write) {
  fetch(from + first * token + head * of_head, token * (int64_t)sizeof(SCALAR), count,
        width * (int64_t)sizeof(SCALAR), write);
}

INLINE void NAMED(fetch_operands)(const NAMED(Asked) *asked, const Rows *rows, int64_t r,
                                  int64_t head, int64_t width) {
  const int64_t *strides = asked->strides;
  NAMED(fetch_tokens)(asked->query, rows->query_first[r], rows->query_count[r], strides[0], head,
                      strides[1], width, 0);
  NAMED(fetch_tokens)(asked->key, rows->first[r], rows->length[r], strides[2], head, strides[3],
                      width, 0);
  NAMED(fetch_tokens)(asked->value, rows->first[r], rows->length[r], strides[4], head, strides[5],
                      width, 0);
}

/* Fetch what attend will want of row r and a head, if there is such a row. */
INLINE void NAMED(fetch_forward)(SCALAR *out, const NAMED(Asked) *asked, const Rows *rows,
                                 const Attending *how, int64_t r, int64_t head) {
  int64_t width = how->width, across = how->heads * width;
  if (r >= rows->rows) return;
  NAMED(fetch_operands)(asked, rows, r, head, width);
  NAMED(fetch_tokens)(out, rows->query_first[r], rows->query_count[r], across, head, width, width,
                      1);
}

/* The same of attend_backward. */
INLINE void NAMED(fetch_backward)(SCALAR *query_gradient, SCALAR *key_gradient,
                                  SCALAR *value_gradient, const SCALAR *grad,
                                  const NAMED(Asked) *asked, const Rows *rows,
                                  const Attending *how, int64_t r, int64_t head) {
  int64_t width = how->width, across = how->heads * width;
  if (r >= rows->rows) return;
  int64_t query = rows->query_first[r], queries = rows->query_count[r];
  int64_t key = rows->first[r], keys = rows->length[r];
  NAMED(fetch_operands)(asked, rows, r, head, width);
  NAMED(fetch_tokens)(grad, query, queries, across, head, width, width, 0);
  NAMED(fetch_tokens)(query_gradient, query, queries, across, head, width, width, 1);
  NAMED(fetch_tokens)(value_gradient, key, keys, across, head, width, width, 1);
  if (key_gradient) NAMED(fetch_tokens)(key_gradient, key, keys, across, head, width, width, 1);
}

/* Row r and one head of attend. */
INLINE void NAMED(attend_head)(Scratch *s, SCALAR *out, float *sums, const NAMED(Asked) *asked,
                               const Rows *rows, const Attending *how, int64_t r, int64_t head) {
  int64_t length = rows->length[r], first = rows->first[r];
  int64_t heads = how->heads, width = how->width;
  int64_t keys = rounded_up(length, LANES), wide = rounded_up(width, LANES);
  const int64_t *strides = asked->strides;
  NAMED(fetch_forward)(out, asked, rows, how, r + 1, head);
  NAMED(take_row)(s, asked, rows, r, head, width, wide);
  for (int64_t i = 0; i < rows->query_count[r]; i += QUERIES) {
    int64_t q = rows->query_first[r] + i, count = rows->query_count[r] - i;
    if (count > QUERIES) count = QUERIES;
    const SCALAR *query = asked->query + q * strides[0] + head * strides[1];
    NAMED(take)(s->query, query, count, QUERIES, strides[0], width, wide);
    if (how->streams) draw(s->bytes, how, first + i, count, head, keys);
    multiply(s->score, s->query, s->key_columns, width, wide, keys);
    for (int64_t b = 0; b < count; b++)
      sums[(q + b) * heads + head] =
          weigh(s->score + b * keys, s->bytes + b * rounded_up(keys, DRAWN), how, i + b, length,
                keys);
    multiply(s->out, s->score, s->value, length, keys, wide);
    NAMED(give)(out + (q * heads + head) * width, s->out, count, heads * width, width, wide);
  }
}

/* Row r and one head of attend_backward. */
INLINE void NAMED(attend_head_backward)(Scratch *s, SCALAR *query_gradient, SCALAR *key_gradient,
                                        SCALAR *value_gradient, const SCALAR *grad,
                                        const float *sums, const NAMED(Asked) *asked,
                                        const Rows *rows, const Attending *how, int64_t r,
                                        int64_t head) {
  int64_t length = rows->length[r], first = rows->first[r];
  int64_t heads = how->heads, width = how->width;
  int64_t keys = rounded_up(length, LANES), wide = rounded_up(width, LANES);
  int64_t across = heads * width, row_at = (first * heads + head) * width;
  const int64_t *strides = asked->strides;
  NAMED(fetch_backward)(query_gradient, key_gradient, value_gradient, grad, asked, rows, how, r + 1,
                        head);
  NAMED(take_row)(s, asked, rows, r, head, width, wide);
  transposed(s->value_columns, s->value, keys, wide);
  memset(s->key_gradient, 0, (size_t)(length * wide) * 4);
  memset(s->value_gradient, 0, (size_t)(length * wide) * 4);
  for (int64_t i = 0; i < rows->query_count[r]; i += QUERIES) {
    int64_t q = rows->query_first[r] + i, count = rows->query_count[r] - i;
    if (count > QUERIES) count = QUERIES;
    int64_t at = (q * heads + head) * width;
    const SCALAR *query = asked->query + q * strides[0] + head * strides[1];
    NAMED(take)(s->query, query, count, QUERIES, strides[0], width, wide);
    NAMED(take)(s->out, grad + at, count, QUERIES, across, width, wide);
    if (how->streams) draw(s->bytes, how, first + i, count, head, keys);
    multiply(s->score, s->query, s->key_columns, width, wide, keys);
    multiply(s->gradient, s->out, s->value_columns, width, wide, keys);
    for (int64_t b = 0; b < count; b++)
      weigh_backward(s->score + b * keys, s->gradient + b * keys, s->weight + b * keys,
                     s->bytes + b * rounded_up(keys, DRAWN), how, sums[(q + b) * heads + head],
                     i + b, length, keys);
    /* Of queries beyond the last, `gradient` is zero as they are, and `weight` is an older one's. */
    memset(s->weight + count * keys, 0, (size_t)((QUERIES - count) * keys) * 4);
    add_outer(s->value_gradient, s->weight, s->out, length, keys, wide);
    if (key_gradient) add_outer(s->key_gradient, s->gradient, s->query, length, keys, wide);
    multiply(s->out, s->gradient, s->key, length, keys, wide);
    NAMED(give)(query_gradient + at, s->out, count, across, width, wide);
  }
  NAMED(give)(value_gradient + row_at, s->value_gradient, length, across, width, wide);
  if (key_gradient)
    NAMED(give)(key_gradient + row_at, s->key_gradient, length, across, width, wide);
}

/* out, query: (queries, heads, width); key, value: (tokens, heads, width); sums: (queries,
 * heads), for the way back. strides: between tokens and between heads of query, key, value;
 * out is contiguous. Tokens of no row are left alone. Returns 0 when memory ran out. */
int ENTRY(attend)(SCALAR *out, float *sums, const SCALAR *query, const SCALAR *key,
                  const SCALAR *value, const int64_t *strides, const Rows *rows,
                  const Attending *how, int threads) {
  const NAMED(Asked) asked = {query, key, value, strides};
  FOR_EACH_HEAD(Scratch, scratch_made(&s, longest, how->width), NAMED(attend_head), out, sums,
                &asked)
}

/* Gradients of attend: query_gradient (queries, heads, width), key_gradient and
 * value_gradient (tokens, heads, width), each contiguous, as is grad; key_gradient may be NULL. */
int ENTRY(attend_backward)(SCALAR *query_gradient, SCALAR *key_gradient, SCALAR *value_gradient,
                           const SCALAR *grad, const float *sums, const SCALAR *query,
                           const SCALAR *key, const SCALAR *value, const int64_t *strides,
                           const Rows *rows, const Attending *how, int threads) {
  const NAMED(Asked) asked = {query, key, value, strides};
  FOR_EACH_HEAD(Scratch, scratch_made(&s, longest, how->width), NAMED(attend_head_backward),
                query_gradient, key_gradient, value_gradient, grad, sums, &asked)
}
