/* Attention inside a row and head, in float: what does not depend on the type of activations. */
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
