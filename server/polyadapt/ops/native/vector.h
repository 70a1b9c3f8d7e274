/* Small vectors of floats, written once for AVX-512, AVX, NEON and SSE through compiler vector types.
 *
 * Every sum has one fixed order: lanes first, then a fixed tree, then the scalar tail. So a result
 * depends on the operands and their length alone, never on threads or on neighbouring rows.
 */
#ifndef POLYADAPT_VECTOR_H
#define POLYADAPT_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vf splat(float value) { return value - (vf){0}; }

/* Contraction is switched off for the build and fused operations are spelled out, so that a vector body
 * and its scalar tail round alike. */
#if LANES == 16
INLINE vf fmav(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#elif LANES == 8 && defined(__FMA__)
INLINE vf fmav(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#elif defined(__aarch64__)
INLINE vf fmav(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
INLINE vf fmav(vf a, vf b, vf c) { return a * b + c; }
INLINE float fma1(float a, float b, float c) { return a * b + c; }
#endif

/* Elements are float32 or bfloat16; `is_half` is a constant wherever this is inlined. */
INLINE size_t element_size(int is_half) { return is_half ? 2 : 4; }

INLINE const void *at(const void *base, int64_t index, int is_half) {
  return (const char *)base + index * (int64_t)element_size(is_half);
}

INLINE float load1(const void *base, int64_t index, int is_half) {
  if (!is_half) return ((const float *)base)[index];
  uint32_t bits = (uint32_t)((const uint16_t *)base)[index] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE vf loadv(const void *base, int64_t index, int is_half) {
  if (!is_half) return *(const vf_any *)((const float *)base + index);
  vh half = *(const vh_any *)((const uint16_t *)base + index);
#if LANES == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#elif defined(__AVX2__) /* compilers make four instructions of the general form */
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
  return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}

/* Round to nearest even; a NaN stays a quiet NaN. */
INLINE uint16_t to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return (uint16_t)((bits >> 16) | 0x0040);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store1(void *base, int64_t index, float value, int is_half) {
  if (is_half)
    ((uint16_t *)base)[index] = to_half(value);
  else
    ((float *)base)[index] = value;
}

INLINE float sum_lanes(vf v) {
  float half[LANES];
  memcpy(half, &v, sizeof half);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++) half[lane] += half[lane + width];
  return half[0];
}

/* out[n] = the lanes of v[n] added up, four at a time. */
INLINE void sum_four(const vf *v, float *out) {
#if LANES == 8
  __m256 pairs = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
  __m256 quads = _mm256_hadd_ps(pairs, _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
#else
  for (int n = 0; n < 4; n++) out[n] = sum_lanes(v[n]);
#endif
}

INLINE float max_lanes(vf v) {
  float best = v[0];
  for (int lane = 1; lane < LANES; lane++) best = v[lane] > best ? v[lane] : best;
  return best;
}

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* exp(x) for x <= 88: below -87.3 it is 0, NaN stays NaN. Relative error under 2 units in the last place
 * (tests/ops/test_native.py measures it through attention). x = n ln 2 + r, |r| <= ln(2)/2;
 * exp(r) = 1 + r + r^2 q(r) with a least-maximum fit of q that is off by 9e-9 at most. */
INLINE vf exp_lanes(vf x) {
  const vf round = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
  vi is_zero = x < splat(-87.3f);
  vf z = fmav(x, splat(1.44269504f), round);
  vf n = z - round;
  vf r = fmav(n, splat(-0.693145752f), x);
  r = fmav(n, splat(-1.42860677e-6f), r);
  vf q = splat(0.0013901784550398588f);
  q = fmav(q, r, splat(0.008364344947040081f));
  q = fmav(q, r, splat(0.041666869074106216f));
  q = fmav(q, r, splat(0.1666657030582428f));
  q = fmav(q, r, splat(0.5f));
  vf e = fmav(q, r * r, r) + splat(1.0f);
  vu power = ((vu)z << 23) + (vu)splat(1.0f); /* 2^n: n lies in the low bits of z */
  return choose(is_zero, splat(0.0f), e * (vf)power);
}

/* tanh(x): for |x| < 0.6 the odd polynomial x + x^3 q(x^2), else 1 - 2 / (exp(2|x|) + 1) with x's sign.
 * Relative error under 4 units in the last place; NaN stays NaN. */
INLINE vf tanh_lanes(vf x) {
  const vi sign_bit = (vi)splat(-0.0f);
  vf size = (vf)((vi)x & ~sign_bit);
  vf z = x * x;
  vf q = splat(-0.006044811103492975f);
  q = fmav(q, z, splat(0.020960984751582146f));
  q = fmav(q, z, splat(-0.05384315177798271f));
  q = fmav(q, z, splat(0.1333271712064743f));
  q = fmav(q, z, splat(-0.333333283662796f));
  vf near = fmav(q * z, x, x);
  vf capped = choose(size > splat(10.0f), splat(10.0f), size);
  vf far = splat(1.0f) - splat(2.0f) / (exp_lanes(capped + capped) + splat(1.0f));
  far = (vf)((vi)far | ((vi)x & sign_bit));
  return choose(size < splat(0.6f), near, far);
}

#endif
