/* What the products of an encoder and its attention on a CPU share: a tile of sums in registers, and the memory that is
   asked for while one is computed. */

#include "cpu.h"

#define NR (2 * LANES) /* outputs of a tile */
#if LANES == 16
#define MR 12 /* rows of a tile: MR * 2 vectors of sums, two of weights and one of x have to be in registers */
#else
#define MR 6
#endif

/* Weights that a thread needs next: it asks memory for so many bytes with each step of its product. The hardware sees
   too late that the next tile begins, and then its first rows wait. Nothing is asked for where `bytes` is 0. */
typedef struct {
  const char *at;
  int64_t bytes;
} stream;

#define LINE 64 /* bytes that memory gives at a time */

/* Not __builtin_prefetch: GCC keeps no sums in registers in a loop that has it. */
#if defined(__AVX2__)
#define FETCH(p) __asm__("prefetcht1 (%0)" : "+r"(p))
#elif defined(__aarch64__)
#define FETCH(p) __asm__("prfm pldl2keep, [%0]" : "+r"(p))
#else
#define FETCH(p)
#endif

INLINE void ask(stream *s) {
  for (const char *end = s->at + s->bytes; s->at < end; s->at += LINE) FETCH(s->at);
}

/* sums[r] += x[r * row + c * column] * w[c * stride .. + NR] for c < k: as many rows at once as registers hold. */
INLINE void outer(const float *x, int64_t row, int64_t column, const float *w, int64_t stride, int64_t k, int rows,
                  stream *next, reg out[MR][2]) {
  reg sums[MR][2];
  for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (reg){0};
  const char *at = next->at;
  const int64_t bytes = next->bytes;
  for (int64_t c = 0; c < k; c++, x += column, w += stride) {
    reg first = *(const vec *)w, second = *(const vec *)(w + LANES);
    FETCH(at); /* without a loop or a condition, for the sums' sake too */
    at += bytes;
    for (int r = 0; r < rows; r++) {
      sums[r][0] += first * x[r * row];
      sums[r][1] += second * x[r * row];
    }
  }
  next->at = at;
  for (int r = 0; r < rows; r++) memcpy(out[r], sums[r], sizeof sums[r]);
}

/* As `outer`, of up to MR rows; returns how many it took. For the compiler their number has to be a constant. */
INLINE int outer_rows(const float *x, int64_t row, int64_t column, const float *w, int64_t stride, int64_t k,
                      int64_t rows, stream *next, reg out[MR][2]) {
  const int count = rows >= MR ? MR : MR > 8 && rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
  switch (count) {
    case MR: outer(x, row, column, w, stride, k, MR, next, out); break;
#if MR > 8
    case 8: outer(x, row, column, w, stride, k, 8, next, out); break;
#endif
    case 4: outer(x, row, column, w, stride, k, 4, next, out); break;
    case 2: outer(x, row, column, w, stride, k, 2, next, out); break;
    default: outer(x, row, column, w, stride, k, 1, next, out);
  }
  return count;
}
