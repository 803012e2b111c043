/* AMX, of Intel's CPUs since Sapphire Rapids: eight tiles of up to 16 rows of 64 bytes, multiplied with each other (Intel
   64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18). */

#define AMX_ROWS 16 /* of a tile */

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define AMX

/* Asks Linux, which has to save more of each thread from now on; whether it agrees. */
INLINE int amx_permitted(void) {
  const long request = 0x1023, tiles = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return syscall(SYS_arch_prctl, request, tiles) == 0;
}

/* Tiles for `rows` rows of x at a time, up to 2 * AMX_ROWS; shaped: for how many this thread has them already. They are
   given back with _tile_release. */
INLINE void amx_shape(int rows, int *shaped) {
  if (rows == *shaped) return;
  struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape = {.palette = 1};
  const int above = rows < AMX_ROWS ? rows : AMX_ROWS, below = rows > AMX_ROWS ? rows - AMX_ROWS : AMX_ROWS;
  const uint8_t heights[8] = {above, above, below, below, above, below, AMX_ROWS, AMX_ROWS};
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64;
  memcpy(shape.rows, heights, sizeof heights);
  _tile_loadconfig(&shape);
  *shaped = rows;
}

/* sums [rows][2 * 16] of rows of x, `row` numbers apart, with weights [k / 2][2 * 16][2]; k: a multiple of 32; both:
   there are more than AMX_ROWS rows; begun: the sums go on from what they are. Each has one order whatever the rows. */
INLINE void amx_outer(const bf16 *x, int64_t row, const bf16 *w, int64_t k, int both, int begun,
                      stream *next, float *sums) {
  float *below = sums + AMX_ROWS * 32;
  if (begun) {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    if (both) _tile_loadd(2, below, 128);
    if (both) _tile_loadd(3, below + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (both) _tile_zero(2);
    if (both) _tile_zero(3);
  }
  for (int64_t c = 0; c < k; c += 32, x += 32, w += 32 * 32) {
    ask(next);
    _tile_loadd(6, w, 128);
    _tile_loadd(4, x, 2 * row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
      _tile_loadd(5, x + AMX_ROWS * row, 2 * row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if (both) _tile_stored(2, below, 128);
  if (both) _tile_stored(3, below + 16, 128);
}
#endif
