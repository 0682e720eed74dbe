/* A layer norm of a residual and what a sublayer adds to it, dropped out; packed_residual.py
 * defines it. */

/* The sum of residual and dropped-out x, rounded to the type; returns its mean. */
static inline float NAMED(add_dropped)(SCALAR *restrict sum, const SCALAR *restrict x,
                                       const SCALAR *restrict residual, const uint8_t *byte,
                                       int32_t rate, float scale, int64_t width) {
  float total = 0.0f;
  if (rate) {
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < width; c++) {
      float kept = byte[c] >= rate ? WIDEN(x[c]) * scale : 0.0f;
      sum[c] = NARROW(kept + WIDEN(residual[c]));
      total += WIDEN(sum[c]);
    }
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < width; c++) {
      sum[c] = NARROW(WIDEN(x[c]) + WIDEN(residual[c]));
      total += WIDEN(sum[c]);
    }
  }
  return total / (float)width;
}

/* out = norm(residual + dropped(x)) * gain + shift. x, residual, out, sum: (entries, width);
 * gain, shift: (width,); mean, inverse: (entries,), of the sum, for the way back. */
void NAMED(residual_norm)(SCALAR *out, SCALAR *sum, float *mean, float *inverse, const SCALAR *x,
                          const SCALAR *residual, const SCALAR *gain, const SCALAR *shift,
                          int64_t entries, int64_t width, float epsilon, const int64_t *streams,
                          int64_t key, int32_t rate, float scale, int threads) {
  int64_t words = (width + 7) / 8;
#pragma omp parallel num_threads(threads)
  {
    uint64_t bytes[words];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < entries; t++) {
      SCALAR *restrict s = sum + t * width, *restrict to = out + t * width;
      if (rate) random_bytes(bytes, (uint64_t)streams[t], (uint64_t)key, words);
      float middle = NAMED(add_dropped)(s, x + t * width, residual + t * width,
                                        (const uint8_t *)bytes, rate, scale, width);
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < width; c++) {
        float from_middle = WIDEN(s[c]) - middle;
        squares += from_middle * from_middle;
      }
      float over = 1.0f / sqrtf(squares / (float)width + epsilon);
      for (int64_t c = 0; c < width; c++)
        to[c] = NARROW((WIDEN(s[c]) - middle) * over * WIDEN(gain[c]) + WIDEN(shift[c]));
      mean[t] = middle;
      inverse[t] = over;
    }
  }
}

/* Gradients of residual_norm with respect to x and residual, of grad; all (entries, width).
 * The norm's own gain and shift are frozen. */
void NAMED(residual_norm_backward)(SCALAR *x_gradient, SCALAR *residual_gradient,
                                   const SCALAR *grad, const SCALAR *sum, const float *mean,
                                   const float *inverse, const SCALAR *gain, int64_t entries,
                                   int64_t width, const int64_t *streams, int64_t key,
                                   int32_t rate, float scale, int threads) {
  int64_t words = (width + 7) / 8;
#pragma omp parallel num_threads(threads)
  {
    uint64_t bytes[words];
    const uint8_t *byte = (const uint8_t *)bytes;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < entries; t++) {
      const SCALAR *restrict g = grad + t * width, *restrict s = sum + t * width;
      SCALAR *restrict to = residual_gradient + t * width, *restrict kept = x_gradient + t * width;
      float middle = mean[t], over = inverse[t], along = 0.0f, total = 0.0f;
#pragma omp simd reduction(+ : along, total)
      for (int64_t c = 0; c < width; c++) {
        float of_normed = WIDEN(g[c]) * WIDEN(gain[c]);
        total += of_normed;
        along += of_normed * ((WIDEN(s[c]) - middle) * over);
      }
      total /= (float)width;
      along /= (float)width;
      for (int64_t c = 0; c < width; c++) {
        float normed = (WIDEN(s[c]) - middle) * over;
        to[c] = NARROW((WIDEN(g[c]) * WIDEN(gain[c]) - total - normed * along) * over);
      }
      if (rate) {
        random_bytes(bytes, (uint64_t)streams[t], (uint64_t)key, words);
        for (int64_t c = 0; c < width; c++)
          kept[c] = byte[c] >= rate ? NARROW(WIDEN(to[c]) * scale) : (SCALAR)0;
      }
    }
  }
}
