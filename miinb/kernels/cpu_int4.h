/* int4 weights, as formats.py has them: a row is parts of 16 bytes, 32 columns each. A word's lower half has even columns
   and its upper half the odd ones that follow them, so a part in every quarter of a vector, moved by as many bits as a
   quarter's place asks for, has the order of `split`: of each BLOCK of columns the even ones, then the odd ones. */

#include "cpu_split.h"

#define PART 32              /* columns of a part */
#define SIDES (PART / LANES) /* vectors of a part */

#if defined(__AVX512F__)

/* What the numbers from 0 to 15 stand for in a group. A vector has room for all, and one instruction looks up sixteen. */
typedef struct {
  reg values;
} levels;

/* pair: two bf16, the step and what 0 stands for. */
INLINE levels levels_of(uint32_t pair) {
  const reg number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i both = _mm512_set1_epi32(pair);
  const __m512 step = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  const __m512 low = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000u)));
  return (levels){(reg)_mm512_fmadd_ps((__m512)number, step, low)};
}

/* The weights of one side of a part; what is above a number's four bits the instruction does not see. */
INLINE vec int4_side(const void *part, int side, levels of) {
  const veci shift = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)part));
  return (vec)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, (__m512i)(shift + 16 * side)), (__m512)of.values);
}

#else

/* A group's step by what a number is larger for its place in half a word, for every vector of a half; what 0 stands for. */
typedef struct {
  reg step[SIDES / 2], low;
} levels;

typedef uint32_t words __attribute__((vector_size(4 * LANES)));

INLINE levels levels_of(uint32_t pair) {
  const words both = (words){0} + pair;
  const reg step = (reg)(both << 16), place = {1, 1, 1, 1, 0x1p-4, 0x1p-4, 0x1p-4, 0x1p-4};
  return (levels){{step * place, step * (place * 0x1p-8f)}, (reg)(both & 0xffff0000u)};
}

INLINE vec int4_side(const void *part, int side, levels of) {
  const words low = {15, 15, 15, 15, 240, 240, 240, 240};
  words both;
  memcpy(&both, part, 16);
  memcpy((char *)&both + 16, part, 16);
#if defined(__AVX2__)
  both = (words)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)part));
#endif
  const veci number = (veci)((side % 2 ? both >> 16 : both) & (side < 2 ? low : low << 8));
#if defined(__FMA__)
  return (vec)_mm256_fmadd_ps(_mm256_cvtepi32_ps((__m256i)number), (__m256)of.step[side / 2], (__m256)of.low);
#else
  return (vec)(__builtin_convertvector(number, reg) * of.step[side / 2] + of.low);
#endif
}

#endif
