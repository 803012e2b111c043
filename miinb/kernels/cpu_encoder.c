/* The operators of an encoder on a CPU: all tokens of a batch go through a layer at once, so its products are bound by
   arithmetic. The weights are laid out for that once, when a model loads (cpu_blocks.py), in fp32 or int8.

   A row of outputs depends on its own inputs alone, to the bit: every sum has one order, whatever the batch. */

#include "cpu.h"

#define NR (2 * LANES) /* outputs of a tile */
#if LANES == 16
#define MR 12 /* rows of a tile: MR * 2 vectors of sums, two of weights and one of x have to be in registers */
#else
#define MR 6
#endif
#define CHUNK 192 /* rows that a tile of weights is used for at a time; a multiple of MR */

/* How many outputs stand side by side in a tile: the layout of cpu_blocks.py. */
const int32_t miinb_tile = NR;

/* sums[r] += x[r * row + c * column] * w[c * stride .. + NR] for c < k: as many rows at once as registers hold. */
INLINE void outer(const float *x, int64_t row, int64_t column, const float *w, int64_t stride, int64_t k, int rows,
                  reg out[MR][2]) {
  reg sums[MR][2] = {{{0}}};
  for (int64_t c = 0; c < k; c++, x += column, w += stride) {
    reg first = *(const vec *)w, second = *(const vec *)(w + LANES);
    for (int r = 0; r < rows; r++) {
      sums[r][0] += first * x[r * row];
      sums[r][1] += second * x[r * row];
    }
  }
  for (int r = 0; r < rows; r++) memcpy(out[r], sums[r], sizeof sums[r]);
}

/* As `outer`: for the compiler the number of rows has to be a constant. */
INLINE void outer_rows(const float *x, int64_t row, int64_t column, const float *w, int64_t stride, int64_t k,
                       int64_t rows, reg out[MR][2]) {
  if (rows >= MR)
    outer(x, row, column, w, stride, k, MR, out);
  else if (rows >= 4) {
    outer(x, row, column, w, stride, k, 4, out);
    for (int64_t r = 4; r < rows; r++) outer(x + r * row, row, column, w, stride, k, 1, out + r);
  } else if (rows >= 2) {
    outer(x, row, column, w, stride, k, 2, out);
    for (int64_t r = 2; r < rows; r++) outer(x + r * row, row, column, w, stride, k, 1, out + r);
  } else
    outer(x, row, column, w, stride, k, 1, out);
}

/* ---- linear ------------------------------------------------------------------------------------------------- */

typedef struct {
  const char *blocks;
  const float *bias, *residual;
  float *y;
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

/* Bias, activation and residual of the sums of rows [m, m + rows). */
INLINE void finish(const product_args *a, reg sums[MR][2], int64_t m, int rows, int64_t n) {
  const int64_t count = a->n - n < NR ? a->n - n : NR;
  float bias[NR] = {0}, *values = (float *)sums;
  if (a->bias) memcpy(bias, a->bias + n, sizeof(float) * count);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < NR; j++) values[r * NR + j] += bias[j];
  if (a->activation) activate_all[a->activation](values, rows * NR);
  for (int r = 0; r < rows; r++, values += NR) {
    const int64_t at = (m + r) * a->n + n;
    for (int64_t j = 0; a->residual && j < count; j++) values[j] += a->residual[at + j];
    memcpy(a->y + at, values, sizeof(float) * count);
  }
}

/* Rows [m, end) of the outputs [n, n + NR). */
INLINE void plain_tile(const product_args *a, const float *x, int64_t m, int64_t end, int64_t n) {
  reg sums[MR][2];
  for (; m < end; m += MR) {
    outer_rows(x + m * a->k, a->k, 1, (const float *)a->blocks + n * a->k, NR, a->k, end - m, sums);
    finish(a, sums, m, end - m < MR ? end - m : MR, n);
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
                       reg out[MR][2]) {
  reg sums[MR][2] = {{{0}}};
  for (int64_t g = 0; g < groups; g++, block += BLOCK_BYTES, x += GROUP) {
    const ints *w = (const ints *)(block + 8 * NR);
    veci whole[IR][2];
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
INLINE void int8_tile(const product_args *a, const uint8_t *x, const float *scales, int64_t m, int64_t end, int64_t n) {
  const int64_t groups = (a->k + GROUP - 1) / GROUP;
  const char *block = a->blocks + n / NR * groups * BLOCK_BYTES;
  reg sums[MR][2];
  for (int64_t count; m < end; m += count) {
    const uint8_t *row = x + m * groups * GROUP;
    const float *scale = scales + m * groups;
    count = end - m >= IR ? IR : end - m >= 2 ? 2 : 1;
    if (count == IR) int8_outer(row, scale, block, groups, IR, sums);
    if (count == 2) int8_outer(row, scale, block, groups, 2, sums);
    if (count == 1) int8_outer(row, scale, block, groups, 1, sums);
    finish(a, sums, m, count, n);
  }
}

/* activation(x @ w.T + bias) + residual of x [m, k] and weights as cpu_blocks.py lays them out. */
void miinb_blocked_linear(const float *x, const void *blocks, const float *bias, const float *residual, float *y,
                          int64_t m, int64_t n, int64_t k, int activation, int int8) {
  const product_args a = {blocks, bias, residual, y, n, k, activation};
  const int64_t groups = (k + GROUP - 1) / GROUP, tiles = (n + NR - 1) / NR;
  uint8_t *numbers = NULL;
  float *scales = NULL;
  if (int8 && (posix_memalign((void **)&numbers, 64, m * groups * GROUP) ||
               posix_memalign((void **)&scales, 64, sizeof(float) * m * groups)))
    abort();
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads();
    int64_t chunks = (m + CHUNK - 1) / CHUNK;
    if (tiles * chunks < threads) chunks = (threads + tiles - 1) / tiles;
    const int64_t rows = ((m + chunks - 1) / chunks + MR - 1) / MR * MR;
    if (int8) {
#pragma omp for
      for (int64_t i = 0; i < m; i++) quantize_row(x + i * k, numbers + i * groups * GROUP, scales + i * groups, k);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tiles * chunks; i++) {
      const int64_t from = i / tiles * rows, end = from + rows < m ? from + rows : m, at = i % tiles * NR;
      if (int8)
        int8_tile(&a, numbers, scales, from, end, at);
      else
        plain_tile(&a, x, from, end, at);
    }
  }
  free(numbers);
  free(scales);
}

/* ---- attention within packed sequences ------------------------------------------------------------------------ */

#define QUERIES 128 /* of one head that a thread takes at a time; a multiple of NR */

typedef struct {
  const void *qkv;
  const int32_t *starts;
  void *out;
  int64_t heads, size;
  float scale;
} packed_args;

/* Room of one thread, all fp32. */
typedef struct {
  float *k, *v;    /* [length][size] and [tiles of size][length][NR]: of one head of a sequence */
  float *q;        /* [size][NR]: queries side by side, scaled */
  float *scores;   /* [length][NR] */
} packed_room;

INLINE void take_keys(const packed_args *a, packed_room *room, const void *qkv, int64_t length, int half) {
  const int64_t size = a->size, row = 3 * a->heads * size;
  for (int64_t p = 0; p < length; p++) {
    const int64_t k = p * row + a->heads * size, v = k + a->heads * size;
    for (int64_t i = 0; i < size; i++) room->k[p * size + i] = load(qkv, k + i, half);
    for (int64_t i = 0; i < size; i += NR) {
      float *to = room->v + (i * length + p * NR);
      const int64_t count = size - i < NR ? size - i : NR;
      if (count == NR)
        for (int64_t j = 0; j < NR; j++) to[j] = load(qkv, v + i + j, half);
      else
        for (int64_t j = 0; j < NR; j++) to[j] = j < count ? load(qkv, v + i + j, half) : 0;
    }
  }
}

/* Softmax of each column of scores [length][NR], not yet divided by the columns' sums, which are returned. */
INLINE void softmax(float *scores, int64_t length, reg sums[2]) {
  for (int side = 0; side < 2; side++) {
    vec *at = (vec *)(scores + side * LANES);
    reg best = *at, sum = {0};
    for (int64_t p = 1; p < length; p++) {
      const vec score = *(const vec *)(scores + p * NR + side * LANES);
      const veci larger = score > best;
      best = (reg)(((veci)score & larger) | ((veci)best & ~larger));
    }
    for (int64_t p = 0; p < length; p++) {
      float *score = scores + p * NR + side * LANES;
      *(vec *)score -= best;
      for (int j = 0; j < LANES; j++) score[j] = exp_below(score[j]);
      sum += *(const vec *)score;
    }
    sums[side] = sum;
  }
}

/* Up to NR queries of one head, whose keys and values are in the room. */
INLINE void attend(const packed_args *a, packed_room *room, const void *qkv, void *out, int64_t queries,
                   int64_t length, int half) {
  const int64_t size = a->size, row = 3 * a->heads * size;
  reg sums[MR][2], mass[2];
  for (int64_t i = 0; i < size; i++)
    for (int64_t j = 0; j < NR; j++)
      room->q[i * NR + j] = j < queries ? load(qkv, j * row + i, half) * a->scale : 0;
  for (int64_t p = 0; p < length; p += MR) {
    outer_rows(room->k + p * size, size, 1, room->q, NR, size, length - p, sums);
    memcpy(room->scores + p * NR, sums, sizeof(float) * NR * (length - p < MR ? length - p : MR));
  }
  softmax(room->scores, length, mass);
  for (int64_t i = 0; i < size; i += NR)
    for (int64_t j = 0; j < queries; j += MR) {
      outer_rows(room->scores + j, 1, NR, room->v + i * length, NR, length, queries - j, sums);
      for (int64_t r = 0; r < MR && j + r < queries; r++) {
        const float by = 1 / ((const float *)mass)[j + r], *sum = (const float *)sums[r];
        for (int64_t c = 0; c < NR && i + c < size; c++)
          store(out, (j + r) * a->heads * size + i + c, sum[c] * by, half);
      }
    }
}

/* Queries [first, first + QUERIES) of head h of a sequence. */
INLINE void attend_part(const packed_args *a, packed_room *room, int64_t sequence, int64_t h, int64_t first, int half) {
  const int64_t start = a->starts[sequence], length = a->starts[sequence + 1] - start, size = a->size;
  const int64_t row = 3 * a->heads * size, bytes = half ? 2 : 4;
  if (first >= length) return;
  const char *qkv = (const char *)a->qkv + (start * row + h * size) * bytes;
  char *out = (char *)a->out + (start * a->heads + h) * size * bytes;
  take_keys(a, room, qkv, length, half);
  for (int64_t j = first; j < first + QUERIES && j < length; j += NR)
    attend(a, room, qkv + j * row * bytes, out + j * a->heads * size * bytes, length - j < NR ? length - j : NR, length,
           half);
}

/* qkv [tokens, 3 * heads * size]; starts [sequences + 1]; longest: at least the longest sequence's tokens. */
void miinb_packed_attention(const void *qkv, const int32_t *starts, void *out, int64_t sequences, int64_t longest,
                            int64_t heads, int64_t size, float scale, int half) {
  const packed_args a = {qkv, starts, out, heads, size, scale};
  const int64_t parts = (longest + QUERIES - 1) / QUERIES, wide = (size + NR - 1) / NR * NR;
#pragma omp parallel
  {
    float *all;
    if (posix_memalign((void **)&all, 64, sizeof(float) * (longest * (size + wide + NR) + size * NR))) abort();
    packed_room room = {all + size * NR + longest * (NR + wide), all + size * NR + longest * NR, all, all + size * NR};
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < sequences * parts * heads; i++) {
      const int64_t sequence = i / (parts * heads), first = i / heads % parts * QUERIES;
      if (half)
        attend_part(&a, &room, sequence, i % heads, first, 1);
      else
        attend_part(&a, &room, sequence, i % heads, first, 0);
    }
    free(all);
  }
}
