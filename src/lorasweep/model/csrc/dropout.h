/* Keyed dropout; packed_dropout.py defines it. */

/* out = x where kept, times scale; out may be x. x, out: (entries, width). rates: of each
 * entry, of 256; or NULL for `rate`. */
void NAMED(drop)(SCALAR *out, const SCALAR *x, int64_t entries, int64_t width,
                 const int64_t *streams, int64_t key, const int16_t *rates, int32_t rate,
                 float scale, int threads) {
  int64_t eights = (width + 7) / 8;
#pragma omp parallel num_threads(threads)
  {
    uint64_t bytes[eights];
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
      random_bytes(bytes, (uint64_t)streams[t], (uint64_t)key, eights);
      if (scale == 1.0f)
        for (int64_t c = 0; c < width; c++) to[c] = byte[c] >= limit ? from[c] : (SCALAR)0;
      else
        for (int64_t c = 0; c < width; c++)
          to[c] = byte[c] >= limit ? NARROW(WIDEN(from[c]) * scale) : (SCALAR)0;
    }
  }
}
