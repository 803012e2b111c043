/* Attention of an encoder on a CPU: within sequences of any lengths that are packed one after another.

   A row of outputs depends on its own sequence alone, to the bit: every sum has one order, whatever the batch. */

#include "cpu_outer.h"
#include "cpu_amx.h"

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
  stream none = {qkv, 0};
  for (int64_t i = 0; i < size; i++)
    for (int64_t j = 0; j < NR; j++)
      room->q[i * NR + j] = j < queries ? load(qkv, j * row + i, half) * a->scale : 0;
  for (int64_t p = 0, count; p < length; p += count) {
    count = outer_rows(room->k + p * size, size, 1, room->q, NR, size, length - p, &none, sums);
    memcpy(room->scores + p * NR, sums, sizeof(float) * NR * count);
  }
  softmax(room->scores, length, mass);
  for (int64_t i = 0; i < size; i += NR)
    for (int64_t j = 0, count; j < queries; j += count) {
      count = outer_rows(room->scores + j, 1, NR, room->v + i * length, NR, length, queries - j, &none, sums);
      for (int64_t r = 0; r < count; r++) {
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

/* ---- the same by AMX, of bf16 and heads of whole steps ---------------------------------------------------------- */

#if defined(AMX)
#define SIDE (2 * AMX_ROWS) /* queries, keys and numbers of a head that are multiplied at a time */

/* Room of one thread. */
typedef struct {
  uint32_t *k; /* [tiles of keys][size / 2][SIDE]: pairs of a key's numbers */
  uint32_t *v; /* [tiles of size][keys / 2][SIDE]: one number of two keys */
  float *scores; /* [tiles of keys][SIDE queries][SIDE] */
  bf16 *shares;  /* [SIDE queries][keys] */
} amx_room;

INLINE int64_t filled(int64_t length) { return (length + SIDE - 1) / SIDE * SIDE; }

/* Keys and values of one head; those that are not there are zeros. */
INLINE void amx_take(const packed_args *a, const amx_room *room, const bf16 *qkv, int64_t length) {
  const int64_t size = a->size, row = 3 * a->heads * size, keys = filled(length);
  const bf16 *k = qkv + a->heads * size, *v = k + a->heads * size;
  for (int64_t p = 0; p < keys; p++) {
    uint32_t *to = room->k + p / SIDE * size / 2 * SIDE + p % SIDE;
    for (int64_t i = 0; i < size / 2; i++, to += SIDE) {
      *to = 0;
      if (p < length) memcpy(to, k + p * row + 2 * i, 4);
    }
  }
  for (int64_t i = 0; i < size; i += SIDE)
    for (int64_t p = 0; p < keys; p += 2) {
      uint32_t *to = room->v + (i * keys + p * SIDE) / 2;
      const bf16 *first = v + p * row + i, *second = first + row;
      for (int j = 0; j < SIDE; j++) to[j] = 0;
      if (p < length)
        for (int j = 0; j < SIDE; j++) to[j] = first[j];
      if (p + 1 < length)
        for (int j = 0; j < SIDE; j++) to[j] |= (uint32_t)second[j] << 16;
    }
}

/* The shares of one query's keys, not yet divided by their sum, which is returned. */
static __attribute__((noinline)) float amx_softmax(float *scores, bf16 *shares, int64_t length, float scale) {
  const int64_t keys = filled(length);
  __m512 best = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t p = 0; p < keys; p += LANES) {
    float *at = scores + p / SIDE * SIDE * SIDE + p % SIDE;
    for (int64_t j = length > p ? length - p : 0; j < LANES; j++) at[j] = -INFINITY; /* keys that are not there */
    best = _mm512_max_ps(_mm512_loadu_ps(at), best); /* which passes by what is NaN, as `softmax` does */
  }
  best = _mm512_set1_ps(_mm512_reduce_max_ps(best) * scale);
  for (int64_t p = 0; p < keys; p += LANES) {
    float *at = scores + p / SIDE * SIDE * SIDE + p % SIDE;
    const __m512 below = _mm512_fmsub_ps(_mm512_loadu_ps(at), _mm512_set1_ps(scale), best);
    const __mmask16 counts = _mm512_cmp_ps_mask(below, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ); /* NaN does too */
    _mm512_storeu_ps(at, below);
    for (int j = 0; j < LANES; j++) at[j] = exp_below(at[j]);
    const __m256i share = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(counts, at));
    _mm256_storeu_si256((__m256i *)(shares + p), share);
    sum = _mm512_add_ps(sum, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(share), 16));
  }
  return _mm512_reduce_add_ps(sum);
}

/* Up to SIDE queries of one head, whose keys and values are in the room. */
INLINE void amx_attend(const packed_args *a, const amx_room *room, const bf16 *q, bf16 *out, int rows, int64_t length,
                       int *shaped) {
  const int64_t size = a->size, keys = filled(length), row = 3 * a->heads * size, to = a->heads * size;
  float sums[SIDE * SIDE] __attribute__((aligned(64))), by[SIDE];
  stream none = {(const char *)q, 0};
  amx_shape(rows, shaped);
  for (int64_t p = 0; p < keys; p += SIDE) {
    const bf16 *k = (const bf16 *)(room->k + p * size / 2);
    if (rows > AMX_ROWS)
      amx_outer(q, row, k, size, 1, 0, &none, room->scores + p * SIDE);
    else
      amx_outer(q, row, k, size, 0, 0, &none, room->scores + p * SIDE);
  }
  for (int r = 0; r < rows; r++)
    by[r] = 1 / amx_softmax(room->scores + r * SIDE, room->shares + r * keys, length, a->scale);
  for (int64_t i = 0; i < size; i += SIDE) {
    const bf16 *v = (const bf16 *)(room->v + i * keys / 2);
    if (rows > AMX_ROWS)
      amx_outer(room->shares, keys, v, keys, 1, 0, &none, sums);
    else
      amx_outer(room->shares, keys, v, keys, 0, 0, &none, sums);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < SIDE; j++) out[r * to + i + j] = narrow(sums[r * SIDE + j] * by[r]);
  }
}

/* As `attend_part`. */
static __attribute__((noinline)) void amx_part(const packed_args *a, const amx_room *room, int64_t sequence, int64_t h,
                                               int64_t first, int *shaped) {
  const int64_t start = a->starts[sequence], length = a->starts[sequence + 1] - start, size = a->size;
  const int64_t row = 3 * a->heads * size;
  if (first >= length) return;
  const bf16 *qkv = (const bf16 *)a->qkv + start * row + h * size;
  bf16 *out = (bf16 *)a->out + (start * a->heads + h) * size;
  amx_take(a, room, qkv, length);
  for (int64_t j = first; j < first + QUERIES && j < length; j += SIDE)
    amx_attend(a, room, qkv + j * row, out + j * a->heads * size, length - j < SIDE ? length - j : SIDE, length, shaped);
}

static void amx_attention(const packed_args *a, int64_t sequences, int64_t longest) {
  const int64_t parts = (longest + QUERIES - 1) / QUERIES, keys = filled(longest);
#pragma omp parallel
  {
    int shaped = 0;
    float *all;
    if (posix_memalign((void **)&all, 64, sizeof(float) * keys * (a->size + SIDE + SIDE / 2))) abort();
    uint32_t *rest = (uint32_t *)(all + keys * SIDE);
    const amx_room room = {rest, rest + keys * a->size / 2, all, (bf16 *)(rest + keys * a->size)};
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < sequences * parts * a->heads; i++)
      amx_part(a, &room, i / (parts * a->heads), i % a->heads, i / a->heads % parts * QUERIES, &shaped);
    if (shaped) _tile_release();
    free(all);
  }
}
#endif

/* qkv [tokens, 3 * heads * size]; starts [sequences + 1]; longest: at least the longest sequence's tokens; half: bf16; amx: by it, where
   it can be used. */
void miinb_packed_attention(const void *qkv, const int32_t *starts, void *out, int64_t sequences, int64_t longest,
                            int64_t heads, int64_t size, float scale, int half, int amx) {
  const packed_args a = {qkv, starts, out, heads, size, scale};
#if defined(AMX)
  if (amx && size % SIDE == 0) {
    amx_attention(&a, sequences, longest);
    return;
  }
#endif
  (void)amx;
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
