/* The operators of an encoder on a CPU: all tokens of a batch go through a layer at once, so its products are bound by
   arithmetic. The weights are laid out for that once, when a model loads (cpu_blocks.py), in fp32 or int8.

   A row of outputs depends on its own inputs alone, to the bit: every sum has one order, whatever the batch. */

#include "cpu_outer.h"
#include "cpu_amx.h"

#define CHUNK 192 /* rows that a tile of weights is used for at a time; a multiple of MR */

/* How many outputs stand side by side in a tile: the layout of cpu_blocks.py. */
const int32_t miinb_tile = NR;

/* ---- linear ------------------------------------------------------------------------------------------------- */

typedef struct {
  const char *blocks;
  const void *bias, *residual;
  void *y;
  int64_t n, k;
  int activation;
} product_args;

/* Of all rows of a tile at once: the compiler makes vectors of it. */
#define ACTIVATE_ALL(KIND)                                                         \
  static __attribute__((noinline)) void activate_##KIND(float *values, int64_t n) { \
    for (int64_t j = 0; j < n; j++) values[j] = activate(values[j], KIND);         \
  }
ACTIVATE_ALL(RELU)
ACTIVATE_ALL(SILU)
ACTIVATE_ALL(GELU)
ACTIVATE_ALL(GELU_TANH)
ACTIVATE_ALL(TANH)
static void (*const activate_all[])(float *, int64_t) = {NULL, activate_RELU, activate_SILU, activate_GELU,
                                                         activate_GELU_TANH, activate_TANH};

/* One row of a tile: its first `count` outputs, which begin at `at`. */
INLINE void finish_row(const product_args *a, float *values, int64_t at, int64_t count, int half) {
  for (int64_t j = 0; a->residual && j < count; j++) values[j] += load(a->residual, at + j, half);
  for (int64_t j = 0; j < count; j++) store(a->y, at + j, values[j], half);
}

/* Bias, activation and residual of the sums [rows][NR] of rows [m, m + rows); half: all but the sums are bf16. */
INLINE void finish(const product_args *a, float *values, int64_t m, int rows, int64_t n, int half) {
  const int64_t count = a->n - n < NR ? a->n - n : NR;
  float bias[NR] = {0};
  for (int64_t j = 0; a->bias && j < count; j++) bias[j] = load(a->bias, n + j, half);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < NR; j++) values[r * NR + j] += bias[j];
  if (a->activation) activate_all[a->activation](values, rows * NR);
  for (int r = 0; r < rows; r++, values += NR) {
    const int64_t at = (m + r) * a->n + n;
    if (count == NR)
      finish_row(a, values, at, NR, half);
    else
      finish_row(a, values, at, count, half);
  }
}

/* Rows [m, end) of the outputs [n, n + NR). */
static __attribute__((noinline)) void plain_tile(const product_args *a, const float *x, int64_t m, int64_t end, int64_t n, stream *next) {
  reg sums[MR][2];
  for (int count; m < end; m += count) {
    count = outer_rows(x + m * a->k, a->k, 1, (const float *)a->blocks + n * a->k, NR, a->k, end - m, next, sums);
    finish(a, (float *)sums, m, count, n, 0);
  }
}

/* ---- linear of int8 ------------------------------------------------------------------------------------------ */

/* Both sides are whole numbers, of up to LEVELS and with a scale for each GROUP columns: of x found here, row by row.
   x is moved by OFFSET to be unsigned, which the instructions want; what that adds is taken off by the sums of the
   weights, from which a group's sums begin. Without the instructions that add to 32 bits at once (VNNI) four products
   are added in 16 bits first, so that numbers have 7 bits: 4 * 127 * 63 < 2^15. */
#define GROUP 64
#define STEP 8 /* columns multiplied at a time */
#if defined(__AVX512VNNI__) || (LANES == 8 && defined(__AVXVNNI__)) || !defined(__AVX2__)
#define LEVELS 127
#else
#define LEVELS 63
#endif
#define OFFSET (LEVELS + 1)
#define BLOCK_BYTES (NR * (4 + 4 + GROUP)) /* sums, scales and numbers of one group of a tile */
#define IR (LANES == 16 ? 8 : 4)           /* rows of a tile */

const int32_t miinb_levels = LEVELS;

typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t any_int __attribute__((aligned(1), may_alias));

/* The instructions: four columns of one row of x for every lane; products of four columns of each lane's output, in
   16 bits; the sums of pairs in 32 bits. */
#if defined(__AVX512F__)
#define EVERY(p) ((veci)_mm512_set1_epi32(*(const any_int *)(p)))
#define FOURS(x, w) ((veci)_mm512_maddubs_epi16((__m512i)(x), (__m512i)(w)))
#define ADD(a, b) ((veci)_mm512_add_epi16((__m512i)(a), (__m512i)(b)))
#define PAIRS(a) ((veci)_mm512_madd_epi16((__m512i)(a), _mm512_set1_epi16(1)))
#define DOT(sums, x, w) ((veci)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(x), (__m512i)(w)))
#elif defined(__AVX2__)
#define EVERY(p) ((veci)_mm256_set1_epi32(*(const any_int *)(p)))
#define FOURS(x, w) ((veci)_mm256_maddubs_epi16((__m256i)(x), (__m256i)(w)))
#define ADD(a, b) ((veci)_mm256_add_epi16((__m256i)(a), (__m256i)(b)))
#define PAIRS(a) ((veci)_mm256_madd_epi16((__m256i)(a), _mm256_set1_epi16(1)))
#define DOT(sums, x, w) ((veci)_mm256_dpbusd_avx_epi32((__m256i)(sums), (__m256i)(x), (__m256i)(w)))
#else
INLINE veci EVERY(const uint8_t *p) { return (veci){0} + *(const any_int *)p; }
INLINE veci DOT(veci sums, veci x, veci w) {
  for (int lane = 0; lane < LANES; lane++)
    for (int j = 0; j < 4; j++) sums[lane] += ((const uint8_t *)&x)[4 * lane + j] * ((const int8_t *)&w)[4 * lane + j];
  return sums;
}
#endif

/* sums[side] += the products of STEP columns of one row of x with a tile of weights: four columns of each side, then
   the other four. */
INLINE void add_products(veci sums[2], const uint8_t *x, const veci w[4]) {
  veci first = EVERY(x);
  KEEP(first);
#if LEVELS == 127
  const veci second = EVERY(x + 4);
  for (int side = 0; side < 2; side++) sums[side] = DOT(DOT(sums[side], first, w[side]), second, w[2 + side]);
#else
  veci left = FOURS(first, w[0]), right = FOURS(first, w[1]), second = EVERY(x + 4);
  KEEP(second);
  left = ADD(left, FOURS(second, w[2]));
  right = ADD(right, FOURS(second, w[3]));
  sums[0] += PAIRS(left);
  sums[1] += PAIRS(right);
#endif
  KEEP(sums[0]);
  KEEP(sums[1]);
}

/* A row of x [k] as numbers [groups * GROUP] and scales [groups]. What is not finite makes a scale that is not. */
INLINE void quantize_row(const float *x, uint8_t *numbers, float *scales, int64_t k) {
  for (int64_t from = 0; from < k; from += GROUP, numbers += GROUP) {
    float values[GROUP] = {0}, largest;
    int32_t bits[GROUP], top = 0;
    memcpy(values, x + from, sizeof(float) * (k - from < GROUP ? k - from : GROUP));
    memcpy(bits, values, sizeof bits);
    for (int i = 0; i < GROUP; i++) { /* as integers, numbers without their sign have the same order; NaN is on top */
      const int32_t size = bits[i] & 0x7fffffff;
      top = size > top ? size : top;
    }
    memcpy(&largest, &top, 4);
    const int usable = largest > 1e-30f && top < 0x7f800000;
    const float by = usable ? LEVELS / largest : 0;
    *scales++ = top < 0x7f800000 ? largest / LEVELS : NAN;
    for (int i = 0; i < GROUP; i++) numbers[i] = (uint8_t)((int32_t)rintf(values[i] * by) + OFFSET);
  }
}

/* out[r]: sums of `rows` rows of x with a tile of weights. */
INLINE void int8_outer(const uint8_t *x, const float *scale, const char *block, int64_t groups, int rows,
                       stream *next, reg out[MR][2]) {
  reg sums[MR][2] = {{{0}}};
  for (int64_t g = 0; g < groups; g++, block += BLOCK_BYTES, x += GROUP) {
    const ints *w = (const ints *)(block + 8 * NR);
    veci whole[IR][2];
    ask(next);
    for (int r = 0; r < rows; r++) {
      whole[r][0] = ((const ints *)block)[0];
      whole[r][1] = ((const ints *)block)[1];
    }
    for (int64_t c = 0; c < GROUP; c += STEP, w += 4) {
      veci four[4] = {w[0], w[1], w[2], w[3]};
      for (int i = 0; i < 4; i++) KEEP(four[i]);
      for (int r = 0; r < rows; r++) add_products(whole[r], x + r * groups * GROUP + c, four);
    }
    const vec *scales = (const vec *)(block + 4 * NR);
    for (int r = 0; r < rows; r++)
      for (int side = 0; side < 2; side++)
        sums[r][side] += __builtin_convertvector(whole[r][side], reg) * (scales[side] * scale[r * groups + g]);
  }
  for (int r = 0; r < rows; r++) memcpy(out[r], sums[r], sizeof sums[r]);
}

/* Rows [m, end) of the outputs [n, n + NR). */
static __attribute__((noinline)) void int8_tile(const product_args *a, const uint8_t *x, const float *scales, int64_t m, int64_t end, int64_t n,
                      stream *next) {
  const int64_t groups = (a->k + GROUP - 1) / GROUP;
  const char *block = a->blocks + n / NR * groups * BLOCK_BYTES;
  reg sums[MR][2];
  for (int count; m < end; m += count) {
    const uint8_t *row = x + m * groups * GROUP;
    const float *scale = scales + m * groups;
    count = end - m >= IR ? IR : IR > 4 && end - m >= 4 ? 4 : end - m >= 2 ? 2 : 1;
    if (count == IR) int8_outer(row, scale, block, groups, IR, next, sums);
    if (IR > 4 && count == 4) int8_outer(row, scale, block, groups, 4, next, sums);
    if (count == 2) int8_outer(row, scale, block, groups, 2, next, sums);
    if (count == 1) int8_outer(row, scale, block, groups, 1, next, sums);
    finish(a, (float *)sums, m, count, n, 0);
  }
}

/* ---- linear of bf16 ------------------------------------------------------------------------------------------ */

/* Weights are pairs of columns side by side, [K / 2][NR][2], with zeros up to a whole step of AMX. */
#define BF16_STEP 32

#if defined(__AVX512BF16__)
/* out[r]: sums of `rows` rows of x [k] with a tile of weights. */
INLINE void pairs_outer(const bf16 *x, const bf16 *w, int64_t k, int rows, stream *next, reg out[MR][2]) {
  reg sums[MR][2];
  for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (reg){0};
  const char *at = next->at;
  const int64_t bytes = next->bytes;
  for (int64_t c = 0; c < k; c += 2, w += 2 * NR) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(w), second = (__m512bh)_mm512_loadu_si512(w + NR);
    FETCH(at);
    at += bytes;
    for (int r = 0; r < rows; r++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const any_int *)(x + r * k + c));
      sums[r][0] = (reg)_mm512_dpbf16_ps((__m512)sums[r][0], pair, first);
      sums[r][1] = (reg)_mm512_dpbf16_ps((__m512)sums[r][1], pair, second);
    }
  }
  next->at = at;
  for (int r = 0; r < rows; r++) memcpy(out[r], sums[r], sizeof sums[r]);
}

/* Rows [m, end) of the outputs [n, n + NR). */
static __attribute__((noinline)) void pairs_tile(const product_args *a, const bf16 *x, int64_t m, int64_t end, int64_t n, stream *next) {
  const int64_t k = (a->k + BF16_STEP - 1) / BF16_STEP * BF16_STEP;
  const bf16 *w = (const bf16 *)a->blocks + n * k;
  reg sums[MR][2];
  for (int count; m < end; m += count) {
    count = end - m >= MR ? MR : end - m >= 4 ? 4 : 1;
    if (count == MR) pairs_outer(x + m * k, w, k, MR, next, sums);
    if (count == 4) pairs_outer(x + m * k, w, k, 4, next, sums);
    if (count == 1) pairs_outer(x + m * k, w, k, 1, next, sums);
    finish(a, (float *)sums, m, count, n, 1);
  }
}

#endif

#if defined(AMX)
/* So many rows by so many columns at a time, whose weights and sums stay in the L1 cache: from the next one two loads
   take longer than the product of what they load. */
#define BAND 128
#define DEPTH 256

/* The same by AMX. */
static __attribute__((noinline)) void amx_tile(const product_args *a, const bf16 *x, int64_t m, int64_t end, int64_t n, stream *next,
                     int *shaped) {
  const int64_t k = (a->k + BF16_STEP - 1) / BF16_STEP * BF16_STEP;
  const bf16 *w = (const bf16 *)a->blocks + n * k;
  float sums[BAND * NR] __attribute__((aligned(64)));
  for (int64_t band; m < end; m += band) {
    band = end - m < BAND ? end - m : BAND;
    for (int64_t r = 0; r < band; r++) __builtin_prefetch((bf16 *)a->y + (m + r) * a->n + n, 1);
    for (int64_t c = 0; c < k; c += DEPTH) {
      const int64_t deep = k - c < DEPTH ? k - c : DEPTH;
      for (int64_t r = 0; r < band; r += 2 * AMX_ROWS) {
        const int rows = band - r < 2 * AMX_ROWS ? band - r : 2 * AMX_ROWS;
        amx_shape(rows, shaped);
        if (rows > AMX_ROWS)
          amx_outer(x + (m + r) * k + c, k, w + c * NR, deep, 1, c > 0, next, sums + r * NR);
        else
          amx_outer(x + (m + r) * k + c, k, w + c * NR, deep, 0, c > 0, next, sums + r * NR);
      }
    }
    finish(a, sums, m, band, n, 1);
  }
}
#endif

/* ---- linear of any kind ---------------------------------------------------------------------------------------- */

enum { FP32, INT8, BF16, BF16_AMX };

/* With what this CPU multiplies weights of bf16: a kind, or 0 where it has no instructions for them. */
int32_t miinb_bf16(void) {
#if defined(AMX)
  if (amx_permitted()) return BF16_AMX;
#endif
#if defined(__AVX512BF16__)
  return BF16;
#endif
  return 0;
}

typedef struct {
  const void *x;       /* [m][columns] fp32, uint8 or bf16 */
  const float *scales; /* [m][groups] of uint8 */
  int64_t m, tiles, tile_bytes, rows;
  int64_t *claimed; /* pieces of work that a thread has taken; a piece is `rows` rows and a tile of outputs */
} work;

INLINE int64_t claim(const work *w) { return __atomic_fetch_add(w->claimed, 1, __ATOMIC_RELAXED); }

/* Pieces of work until none is left. Each is claimed while the one before is computed, so that its weights are on
   their way by then. */
INLINE void work_off(const product_args *a, const work *w, int kind) {
  int shaped = 0;
  const int64_t pieces = (w->m + w->rows - 1) / w->rows * w->tiles;
  const int height = kind == BF16_AMX ? 2 * AMX_ROWS : kind == INT8 ? IR : MR;
  const int columns = kind == FP32 ? 1 : kind == INT8 ? GROUP : kind == BF16 ? 2 : BF16_STEP; /* of a step */
  for (int64_t i = claim(w), then; i < pieces; i = then) {
    then = claim(w);
    const int64_t from = i / w->tiles * w->rows, end = from + w->rows < w->m ? from + w->rows : w->m;
    const int64_t n = i % w->tiles * NR, steps = (end - from + height - 1) / height * ((a->k + columns - 1) / columns);
    stream next = {a->blocks + then % w->tiles * w->tile_bytes, 0};
    if (then < pieces && then % w->tiles != i % w->tiles) next.bytes = (w->tile_bytes + steps - 1) / steps;
    if (columns > 2) next.bytes = (next.bytes + LINE - 1) / LINE * LINE;
    if (kind == FP32) plain_tile(a, w->x, from, end, n, &next);
    if (kind == INT8) int8_tile(a, w->x, w->scales, from, end, n, &next);
#if defined(__AVX512BF16__)
    if (kind == BF16) pairs_tile(a, w->x, from, end, n, &next);
#endif
#if defined(AMX)
    if (kind == BF16_AMX) amx_tile(a, w->x, from, end, n, &next, &shaped);
#endif
  }
#if defined(AMX)
  if (shaped) _tile_release();
#else
  (void)shaped;
#endif
}

INLINE void *room(int64_t bytes) {
  void *made;
  if (posix_memalign(&made, 64, bytes)) abort();
  return made;
}

/* How many rows a piece of work has: those whose numbers stay in a cache beside a tile of weights. */
INLINE int64_t rows_of(int64_t m, int64_t k, int64_t tiles, int kind, int64_t threads) {
  int64_t most = CHUNK, chunks;
  if (kind >= BF16) most = (1 << 20) / (2 * k) > CHUNK ? (1 << 20) / (2 * k) : CHUNK;
  chunks = (m + most - 1) / most;
  if (tiles * chunks < threads) chunks = (threads + tiles - 1) / tiles;
  const int64_t whole = kind == BF16_AMX ? 32 : MR;
  return ((m + chunks - 1) / chunks + whole - 1) / whole * whole;
}

/* activation(x @ w.T + bias) + residual of x [m, k] and weights as cpu_blocks.py lays them out; kind: of the weights.
   x, bias, residual and y are bf16 where the weights are, and fp32 otherwise. */
void miinb_blocked_linear(const void *x, const void *blocks, const void *bias, const void *residual, void *y,
                          int64_t m, int64_t n, int64_t k, int activation, int kind) {
  const product_args a = {blocks, bias, residual, y, n, k, activation};
  const int64_t groups = (k + GROUP - 1) / GROUP, whole = (k + BF16_STEP - 1) / BF16_STEP * BF16_STEP;
  if (m == 0) return;
  int64_t claimed = 0;
  work w = {x, NULL, m, (n + NR - 1) / NR, 0, 0, &claimed};
  uint8_t *numbers = NULL;
  float *scales = NULL;
  bf16 *filled = NULL;
  w.tile_bytes = kind == FP32 ? 4 * NR * k : kind == INT8 ? groups * BLOCK_BYTES : 2 * NR * whole;
  if (kind == INT8) {
    w.x = numbers = room(m * groups * GROUP);
    w.scales = scales = room(sizeof(float) * m * groups);
  } else if (kind != FP32 && k != whole)
    w.x = filled = room(2 * m * whole);
#pragma omp parallel
  {
#pragma omp single
    w.rows = rows_of(m, k, w.tiles, kind, omp_get_num_threads());
    if (numbers) {
#pragma omp for
      for (int64_t i = 0; i < m; i++)
        quantize_row((const float *)x + i * k, numbers + i * groups * GROUP, scales + i * groups, k);
    }
    if (filled) {
#pragma omp for
      for (int64_t i = 0; i < m; i++) {
        memcpy(filled + i * whole, (const bf16 *)x + i * k, 2 * k);
        memset(filled + i * whole + k, 0, 2 * (whole - k));
      }
    }
    switch (kind) { /* in here: what is passed into a parallel region is no constant for the compiler */
      case FP32: work_off(&a, &w, FP32); break;
      case INT8: work_off(&a, &w, INT8); break;
      case BF16: work_off(&a, &w, BF16); break;
      default: work_off(&a, &w, BF16_AMX);
    }
  }
  free(numbers);
  free(scales);
  free(filled);
}
