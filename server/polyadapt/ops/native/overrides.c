/* What replaces the base for the rows of one segment, one part of one cell a call: see ops/cells.py.
 *
 *   transform   out[p, n g + j] = sum_i x[rows[p], n g + i] T[n, i, j]
 *   swap        y[rows[p], o] = (1 + S[0, o]) y[rows[p], o] + S[1, o] y[rows[p], o'], where o' is o with the
 *               halves of its group of g columns exchanged
 *   dense       y[rows[p], o] += scale * sum_k D[o, k] x[rows[p], k]
 * Sums are float32 in one order, so that a row's bits depend on that row and the weights alone.
 */
#include "calls.h"
#include "tasks.h"
#include "vector.h"

enum { ROW_TILE = 32, OUT_TILE = 64, CHAINS = 2, PAIR = 2 };
enum { COST_TO_THREAD = 60000 }; /* products */
enum { BAD_ROW = 1 };

static int64_t num_tiles(int64_t num, int64_t tile) { return (num + tile - 1) / tile; }

static int64_t check_rows(const override_call_t *call) {
  for (int64_t p = 0; p < call->num_positions; p++)
    if (call->rows[p] < 0 || call->rows[p] >= call->num_rows) return problem(BAD_ROW, p);
  return 0;
}

/* ---------------------------------------------------------------- transform */
/* Columns j.. of block n; `num` vectors of them, or one column where num is 0. */
INLINE void turn(const override_call_t *call, int64_t p, int64_t n, int64_t j, int num, int half, int w_half) {
  const int64_t g = call->group, x = call->rows[p] * call->x_stride + n * g, w = n * g * g + j;
  const int64_t y = p * call->y_stride + n * g + j;
  if (num == 0) {
    float sum = 0.0f;
    for (int64_t i = 0; i < g; i++)
      sum = fma1(load1(call->x, x + i, half), load1(call->w, w + i * g, w_half), sum);
    store1(call->y, y, sum, half);
    return;
  }
  vf sums[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t i = 0; i < g; i++) {
    vf left = splat(load1(call->x, x + i, half));
    for (int v = 0; v < num; v++)
      sums[v] = fmav(left, loadv(call->w, w + i * g + v * LANES, w_half), sums[v]);
  }
  float out[2 * LANES];
  memcpy(out, sums, sizeof out);
  for (int c = 0; c < num * LANES; c++) store1(call->y, y + c, out[c], half);
}

INLINE void turn_rows(const override_call_t *call, int64_t id, int half, int w_half) {
  const int64_t tiles = num_tiles(call->num_positions, ROW_TILE), n = id / tiles, g = call->group;
  const int64_t first = id % tiles * ROW_TILE;
  const int64_t last = first + ROW_TILE < call->num_positions ? first + ROW_TILE : call->num_positions;
  int64_t j = 0;
  for (; j + 2 * LANES <= g; j += 2 * LANES)
    for (int64_t p = first; p < last; p++) turn(call, p, n, j, 2, half, w_half);
  for (; j + LANES <= g; j += LANES)
    for (int64_t p = first; p < last; p++) turn(call, p, n, j, 1, half, w_half);
  for (; j < g; j++)
    for (int64_t p = first; p < last; p++) turn(call, p, n, j, 0, half, w_half);
}

static void transform_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  const override_call_t *call = opaque;
  if (call->is_half)
    call->w_half ? turn_rows(call, id, 1, 1) : turn_rows(call, id, 1, 0);
  else
    call->w_half ? turn_rows(call, id, 0, 1) : turn_rows(call, id, 0, 0);
}

int64_t polyadapt_block_transform(const override_call_t *call) {
  int64_t result = check_rows(call);
  if (result || !call->num_positions) return result;
  int64_t cost = call->num_positions * call->num_in * call->group;
  run_tasks(transform_task, (void *)call,
            call->num_in / call->group * num_tiles(call->num_positions, ROW_TILE),
            cost < COST_TO_THREAD ? 1 : call->threads);
  return 0;
}

/* ---------------------------------------------------------------- swap */
INLINE void swap_row(const override_call_t *call, int64_t p, int half, int w_half) {
  const int64_t y = call->rows[p] * call->y_stride, width = call->num_out, middle = call->group / 2;
  for (int64_t group = 0; group < width; group += call->group)
    for (int64_t low = group; low < group + middle; low++) {
      const int64_t high = low + middle;
      float a = load1(call->y, y + low, half), b = load1(call->y, y + high, half);
      float own = 1.0f + load1(call->w, low, w_half), other = load1(call->w, width + low, w_half);
      store1(call->y, y + low, fma1(other, b, own * a), half);
      own = 1.0f + load1(call->w, high, w_half), other = load1(call->w, width + high, w_half);
      store1(call->y, y + high, fma1(other, a, own * b), half);
    }
}

static void swap_task(void *opaque, int64_t p, int64_t worker) {
  (void)worker;
  const override_call_t *call = opaque;
  if (call->is_half)
    call->w_half ? swap_row(call, p, 1, 1) : swap_row(call, p, 1, 0);
  else
    call->w_half ? swap_row(call, p, 0, 1) : swap_row(call, p, 0, 0);
}

int64_t polyadapt_swap(const override_call_t *call) {
  int64_t result = check_rows(call);
  if (result) return result;
  int64_t cost = call->num_positions * call->num_out;
  run_tasks(swap_task, (void *)call, call->num_positions, cost < COST_TO_THREAD ? 1 : call->threads);
  return 0;
}

/* ---------------------------------------------------------------- dense */
/* `rows` rows from position p on and `num` outputs from o on; both are constants where inlined. */
INLINE void dense_block(const override_call_t *call, int64_t p, int rows, int64_t o, int num, int half,
                        int w_half) {
  const int64_t num_in = call->num_in;
  const void *x[PAIR], *w[PAIR];
  for (int r = 0; r < rows; r++) x[r] = at(call->x, call->rows[p + r] * call->x_stride, half);
  for (int c = 0; c < num; c++) w[c] = at(call->w, (o + c) * num_in, w_half);
  vf sums[PAIR][PAIR][CHAINS];
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < num; c++)
      for (int chain = 0; chain < CHAINS; chain++) sums[r][c][chain] = splat(0.0f);
  int64_t k = 0;
  for (; k + CHAINS * LANES <= num_in; k += CHAINS * LANES)
    for (int chain = 0; chain < CHAINS; chain++) {
      vf xs[PAIR];
      for (int r = 0; r < rows; r++) xs[r] = loadv(x[r], k + chain * LANES, half);
      for (int c = 0; c < num; c++) {
        vf weight = loadv(w[c], k + chain * LANES, w_half);
        for (int r = 0; r < rows; r++) sums[r][c][chain] = fmav(weight, xs[r], sums[r][c][chain]);
      }
    }
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < num; c++) {
      float dot = sum_lanes(sums[r][c][0] + sums[r][c][1]);
      for (int64_t tail = k; tail < num_in; tail++)
        dot = fma1(load1(w[c], tail, w_half), load1(x[r], tail, half), dot);
      int64_t y = call->rows[p + r] * call->y_stride + o + c;
      store1(call->y, y, fma1((float)call->scale, dot, load1(call->y, y, half)), half);
    }
}

INLINE void dense_tile(const override_call_t *call, int64_t id, int half, int w_half) {
  const int64_t tiles = num_tiles(call->num_positions, ROW_TILE);
  const int64_t first = id % tiles * ROW_TILE, low = id / tiles * OUT_TILE;
  const int64_t last = first + ROW_TILE < call->num_positions ? first + ROW_TILE : call->num_positions;
  const int64_t high = low + OUT_TILE < call->num_out ? low + OUT_TILE : call->num_out;
  for (int64_t o = low; o < high; o += PAIR) {
    const int num = high - o < PAIR ? 1 : PAIR;
    int64_t p = first;
    for (; p + PAIR <= last; p += PAIR)
      num == 1 ? dense_block(call, p, PAIR, o, 1, half, w_half)
               : dense_block(call, p, PAIR, o, PAIR, half, w_half);
    if (p < last)
      num == 1 ? dense_block(call, p, 1, o, 1, half, w_half)
               : dense_block(call, p, 1, o, PAIR, half, w_half);
  }
}

static void dense_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  const override_call_t *call = opaque;
  if (call->is_half)
    call->w_half ? dense_tile(call, id, 1, 1) : dense_tile(call, id, 1, 0);
  else
    call->w_half ? dense_tile(call, id, 0, 1) : dense_tile(call, id, 0, 0);
}

int64_t polyadapt_add_dense(const override_call_t *call) {
  int64_t result = check_rows(call);
  if (result || !call->num_positions) return result;
  int64_t cost = call->num_positions * call->num_in * call->num_out;
  run_tasks(dense_task, (void *)call,
            num_tiles(call->num_out, OUT_TILE) * num_tiles(call->num_positions, ROW_TILE),
            cost < COST_TO_THREAD ? 1 : call->threads);
  return 0;
}
