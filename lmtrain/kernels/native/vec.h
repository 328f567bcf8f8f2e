// Vectors of VL floats: masked loads and stores, bf16 conversion, activation functions.
// Included once for each instruction set, inside its namespace; see native.cpp.

typedef float vec __attribute__((vector_size(4 * VL)));
typedef int32_t ivec __attribute__((vector_size(4 * VL)));

static inline vec splat(float x) { return x - vec{}; }

// Unaligned load of VL floats.
typedef float unaligned __attribute__((vector_size(4 * VL), aligned(4), may_alias));
static inline vec load(const float* p) { return *(const unaligned*)p; }

// Loads n floats; the other lanes are 0. Whole vectors are loaded without a mask: on AMD processors
// a masked load waits until earlier stores to its address have left the store queue.
static inline vec load(const float* p, int n) {
  if (n == VL) return load(p);
#if VL == 16
  return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

static inline void store(float* p, vec v, int n) {
  if (n == VL) {
    *(unaligned*)p = v;
    return;
  }
#if VL == 16
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

#ifdef BF16
static inline vec load(const bf16* p, int n) {
  __m256i half = n == VL ? _mm256_loadu_si256((const __m256i_u*)p)
                         : _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

static inline void store(bf16* p, vec v, int n) {
  __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  if (n == VL)
    _mm256_storeu_si256((__m256i_u*)p, half);
  else
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), half);
}
#endif

#ifdef BF16
// e^x with a relative error of 3e-6, enough for results that are rounded to bf16: 2^k · 2^f with
// |f| <= 1/2, 2^f by a polynomial; x is clamped to ±87.
static inline vec exp_(vec x) {
  x = x > 87.0f ? splat(87.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  vec t = x * 1.44269504088896341f;
  vec f = (vec)_mm512_reduce_ps((__m512)t, 0);
  vec p = splat(9.57010143e-3f);
  p = p * f + 5.59178603e-2f;
  p = p * f + 2.40247448e-1f;
  p = p * f + 6.93121815e-1f;
  p = p * f + 9.99999261e-1f;
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)(t - f));
}

// 1 / x with a relative error of 2^-14.
static inline vec reciprocal(vec x) { return (vec)_mm512_rcp14_ps((__m512)x); }

// tanh x: 1 - 2 / (e^2x + 1), or near 0, where that loses precision, an odd polynomial.
static inline vec tanh_(vec x) {
  vec far = 1.0f - 2.0f * reciprocal(exp_(x + x) + 1.0f);
  vec s = x * x;
  vec p = splat(-4.07492399e-2f) * s + 1.30612520e-1f;
  p = p * s + -3.33170180e-1f;
  return s < 0.390625f ? x + x * s * p : far;
}
#else
// e^x: 2^k · e^r with |r| <= ln 2 / 2, e^r by a polynomial; x is clamped to ±87. The coefficients
// of this and of tanh are those of Moshier's Cephes library.
static inline vec exp_(vec x) {
  x = x > 87.0f ? splat(87.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  vec shifted = x * 1.44269504088896341f + magic;
  vec k = shifted - magic;
  vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
  vec p = splat(1.98756915e-4f);
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666654e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * (r * r) + r + 1.0f;
  // The low bits of `shifted` are k; the shift discards the bits of `magic`.
  return p * (vec)(((ivec)shifted << 23) + (ivec)splat(1.0f));
}

// 1 / x for 1 <= x < e^88: an estimate and a Newton step take a quarter of a division's time.
static inline vec reciprocal(vec x) {
#if VL == 16
  vec y = (vec)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// tanh x: 1 - 2 / (e^2x + 1), or near 0, where that loses precision, an odd polynomial.
static inline vec tanh_(vec x) {
  vec far = 1.0f - 2.0f * reciprocal(exp_(x + x) + 1.0f);
  vec s = x * x;
  vec p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  return s < 0.390625f ? x + x * s * p : far;
}
#endif

static inline vec sigmoid(vec x) { return reciprocal(1.0f + exp_(-x)); }
