/* What the operators on a CPU share: vectors, bf16, activations, a thread's part of the work.

   Vectors are GCC's own (https://gcc.gnu.org/onlinedocs/gcc/Vector-Extensions.html): the same source becomes AVX2,
   AVX-512 or NEON. Threads are those of the OpenMP runtime that PyTorch has loaded. */

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vecu __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef float reg __attribute__((vector_size(4 * LANES)));
typedef int32_t veci __attribute__((vector_size(4 * LANES)));
typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

enum { NONE, RELU, SILU, GELU, GELU_TANH, TANH };

INLINE float widen(bf16 h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

INLINE bf16 narrow(float f) { /* to nearest, ties to even; NaN stays NaN */
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)(bits >> 16 | 0x40);
  return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float load(const void *p, int64_t i, int half) {
  return half ? widen(((const bf16 *)p)[i]) : ((const float *)p)[i];
}

INLINE void store(void *p, int64_t i, float f, int half) {
  if (half)
    ((bf16 *)p)[i] = narrow(f);
  else
    ((float *)p)[i] = f;
}

/* Keeps a vector in a register: the compiler would load it anew for every product, and loads are what runs out. */
#if defined(__AVX2__)
#define KEEP(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v)
#endif

typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t index4 __attribute__((vector_size(16)));

INLINE float sum_vec(vec v) {
  vec4 quarter[LANES / 4];
  memcpy(quarter, &v, sizeof v);
  vec4 s = quarter[0];
  for (int i = 1; i < LANES / 4; i++) s += quarter[i];
  s += __builtin_shuffle(s, (index4){2, 3, 0, 1});
  return s[0] + s[1];
}

/* exp of -87 to 88 by 2^n * 2^f with a polynomial for |f| <= 1/2; relative error below 2e-7. NaN stays NaN. */
INLINE float exp_within(float x) {
  float n = rintf(x * 1.44269504f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
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
  return p * scale;
}

INLINE float exp_below(float x) { return exp_within(x < -87.0f ? -87.0f : x); } /* of what is not above 88 */

INLINE float exp_fast(float x) { return exp_below(x > 88.0f ? 88.0f : x); }

/* gelu by erf: the chance that a normal number is above |x| is a polynomial times exp(-x^2 / 2) (Abramowitz and Stegun,
   Handbook of Mathematical Functions, 7.1.26: error below 1e-7 here). */
INLINE float gelu(float x) {
  const float t = 1 / (1 + 0.23164189f * fabsf(x));
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float power = -0.5f * x * x; /* below -80 the product would be denormal, which takes a hundred times as long */
  const float above = 0.5f * p * t * exp_within(power < -80.0f ? -80.0f : power);
  return x * (x >= 0 ? 1 - above : above);
}

INLINE float activate(float x, int kind) {
  switch (kind) {
    case RELU: return x > 0 || x != x ? x : 0;
    case SILU: return x / (1 + exp_fast(-x));
    case GELU: return gelu(x);
    case GELU_TANH: return x / (1 + exp_fast(-1.59576912f * (x + 0.044715f * x * x * x))); /* (1 + tanh(u)) / 2 */
    case TANH: return tanhf(x);
    default: return x;
  }
}

/* A thread's own part of [0, n), in whole blocks. */
INLINE void part(int64_t n, int64_t block, int64_t *start, int64_t *end) {
  int64_t blocks = (n + block - 1) / block, threads = omp_get_num_threads(), me = omp_get_thread_num();
  *start = blocks * me / threads * block;
  *end = blocks * (me + 1) / threads * block;
  if (*end > n) *end = n;
}
