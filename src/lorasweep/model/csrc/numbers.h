/* Numbers of either type, a vector of them at a time; exp; the random bytes of dropout. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define WEYL 0x9E3779B97F4A7C15ull

/* Floats in a vector: as many as a register holds, on any machine that has AVX. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef uint16_t bf16;
typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t octets __attribute__((vector_size(LANES)));

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

/* Memory aligned to vectors, as a vector. */
INLINE floats *vector(float *at) { return (floats *)at; }

INLINE floats spread(float x) { return x - (floats){0}; }

/* first, first + 1, ... */
INLINE ints counting_from(int64_t first) {
  ints at = {0};
  for (int l = 0; l < LANES; l++) at[l] = l;
  return at + (int32_t)first;
}

/* a where the mask is -1, b where it is 0. */
INLINE floats where(ints mask, floats a, floats b) {
  return (floats)(((ints)a & mask) | ((ints)b & ~mask));
}

/* Each number replaced by the one `by` places further, round and round. */
INLINE floats rotated(floats x, int by) {
  return __builtin_shuffle(x, (counting_from(0) + by) & (LANES - 1));
}

INLINE float sum_of(floats x) {
#pragma GCC unroll 4
  for (int by = LANES / 2; by; by /= 2) x += rotated(x, by);
  return x[0];
}

INLINE float largest_of(floats x) {
#pragma GCC unroll 4
  for (int by = LANES / 2; by; by /= 2) x = where(rotated(x, by) > x, rotated(x, by), x);
  return x[0];
}

INLINE floats load_float(const float *at) {
  floats x;
  memcpy(&x, at, sizeof x);
  return x;
}

INLINE floats load_bf16(const bf16 *at) {
  halves x;
  memcpy(&x, at, sizeof x);
  return (floats)(__builtin_convertvector(x, words) << 16);
}

INLINE void store_float(float *at, floats x) { memcpy(at, &x, sizeof x); }

INLINE void store_bf16(bf16 *at, floats x) {
  words bits = (words)x;
  words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  words not_a_number = 0x7FC0u - (words){0};
  rounded = (words)where(x != x, (floats)not_a_number, (floats)rounded);
  halves out = __builtin_convertvector(rounded, halves);
  memcpy(at, &out, sizeof out);
}

/* exp of numbers up to 80, with an error of about one unit in the last place; 0 below float's
 * range; a NaN stays one. Beyond 80 it is any number: of keys that a query doesn't see. */
INLINE floats exp_of(floats x) {
  const float rounder = 12582912.0f; /* 1.5 * 2^23: a sum with it has no fraction */
  ints tiny = x < -87.0f;
  floats low = where(tiny, spread(-87.0f), x);
  floats n = (low * 1.44269504f + rounder) - rounder;
  floats r = low - n * 0.693359375f + n * 2.12194440e-4f;
  floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return where(tiny, spread(0.0f), p * (floats)power);
}

/* SplitMix64's finaliser, as in packed_dropout.py, of a number or of a vector of them. */
#define SCRAMBLE(state)                                \
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull; \
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBull; \
  state ^= state >> 31;

static inline uint64_t scrambled(uint64_t state) {
  SCRAMBLE(state)
  return state;
}

/* Random bytes of one stream; `count` times eight of them. */
static inline void random_bytes(uint64_t *bytes, uint64_t stream, uint64_t key, int64_t count) {
  uint64_t state = scrambled(stream ^ key);
  for (int64_t w = 0; w < count; w++) bytes[w] = scrambled(state + (uint64_t)(w + 1) * WEYL);
}

static inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
