/* A decoder's weights on a CPU are fp32, bf16, int8 or int4. The columns of a row of int8 or int4 are in groups, each with
   a scale or a pair; a weight is widened to the fp32 that it stands for before it is used. */

#include "cpu_int4.h"

#define GROUP 64 /* columns that have one scale or pair */
enum { FP32, BF16, INT8, INT4 }; /* as cpu.py numbers them */

typedef int8_t vecb __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE vec whole(const int8_t *p) { /* GCC 12 makes many instructions of the conversion from bytes */
#if defined(__AVX512F__)
  veci wide = (veci)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
  veci wide = (veci)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  veci wide = __builtin_convertvector(*(const vecb *)p, veci);
#endif
  return __builtin_convertvector(wide, vec);
}

/* Bytes of so many weights. */
INLINE int64_t bytes_of(int64_t count, int kind) {
  return kind == INT4 ? count / 2 : kind == INT8 ? count : kind == BF16 ? 2 * count : 4 * count;
}

/* Whether columns are in groups. */
INLINE int grouped(int kind) { return kind == INT8 || kind == INT4; }

/* Columns that are multiplied at a time. */
INLINE int step_of(int kind) { return kind == INT4 ? PART : BLOCK; }

/* What a group of a row has besides its numbers. */
typedef struct {
  float scale;   /* int8 */
  levels levels; /* int4 */
} factor;

/* bits: of a scale in fp32, or a pair of bf16. */
INLINE factor factor_of(uint32_t bits, int kind) {
  factor f = {0};
  if (kind == INT8) memcpy(&f.scale, &bits, 4);
  if (kind == INT4) f.levels = levels_of(bits);
  return f;
}

/* The weights of a row's step that begins at i are in vectors, one a side: [i, i + LANES), [i + LANES, i + 2 * LANES);
   of bf16 and int4 the even ones of a BLOCK, then the odd ones. */
INLINE vec weights_of(const void *w, int64_t i, int side, factor f, int kind) {
  if (kind == INT4) return int4_side((const char *)w + i / 2, side, f.levels);
  if (kind == INT8) return whole((const int8_t *)w + i + side * LANES) * f.scale;
  if (kind == BF16) return side ? odd((const bf16 *)w + i) : even((const bf16 *)w + i);
  return *(const vec *)((const float *)w + i + side * LANES);
}

/* One weight of a row's end, which no step has: of int4 there is none. */
INLINE float weight(const void *w, int64_t i, factor f, int kind) {
  return kind == INT8 ? ((const int8_t *)w)[i] * f.scale : load(w, i, kind == BF16);
}
