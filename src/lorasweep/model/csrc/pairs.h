/* Pairs of bfloat16 numbers, of processors that multiply two at a time and add both to a float. */
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && \
    defined(__AVX512DQ__)
#define PAIRS
#include <immintrin.h>

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

/* Sixteen numbers, zeros where the mask is 0. A masked load has to wait for what was just stored
 * until it is in the cache. */
INLINE __m256i load_halves(__mmask16 there, const bf16 *at) {
  if (there == 0xFFFF) return _mm256_loadu_si256((const __m256i *)at);
  return _mm256_maskz_loadu_epi16(there, at);
}

/* Sixteen floats as bfloat16, where the mask is 1. A masked store takes longer. */
INLINE void store_halves(bf16 *at, __mmask16 there, __m512 x) {
  __m256i narrow = (__m256i)_mm512_cvtneps_pbh(x);
  if (there == 0xFFFF)
    _mm256_storeu_si256((__m256i *)at, narrow);
  else
    _mm256_mask_storeu_epi16(at, there, narrow);
}

INLINE __mmask16 first_of_16(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}
#endif
