/* The order of numbers that products with bf16 and int4 want. */

#include "cpu.h"

/* bf16 is the upper half of fp32: of 2 * LANES numbers in memory, the even ones move up and the odd ones are there
   already. That is two operations where restoring the order would take five, so the other side of every product is
   put in this order ("split") once instead: by `split` in blocks of BLOCK numbers, what is left over as it is. int4 lies
   so that its numbers come in this order too (cpu_int4.h). */
#define BLOCK (2 * LANES)

INLINE vec even(const bf16 *p) { return (vec)(*(const vecu *)p << 16); }
INLINE vec odd(const bf16 *p) { return (vec)(*(const vecu *)p & 0xffff0000u); }

INLINE void split(const float *from, float *to, int64_t n) {
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK)
    for (int j = 0; j < LANES; j++) {
      to[i + j] = from[i + 2 * j];
      to[i + LANES + j] = from[i + 2 * j + 1];
    }
  for (; i < n; i++) to[i] = from[i];
}

INLINE void widen_split(const bf16 *from, float *to, int64_t n) {
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    *(vec *)(to + i) = even(from + i);
    *(vec *)(to + i + LANES) = odd(from + i);
  }
  for (; i < n; i++) to[i] = widen(from[i]);
}
