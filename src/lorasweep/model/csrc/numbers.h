/* Numbers of either type, exp, and the random bytes of dropout. */
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
