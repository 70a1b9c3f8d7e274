/* What a decoder layer does to each row by itself: norm, gated activation, rotary embedding.
 *
 * A row's bits depend on that row alone.
 */
#include <math.h>

#include "activation.h"
#include "calls.h"
#include "tasks.h"
#include "vector.h"

/* Below this many elements a second thread costs more than it takes over. */
enum { COST_TO_THREAD = 32768, ROWS_PER_TASK = 8 };

/* ---------------------------------------------------------------- y = x / rms(x) * weight
 * Root mean square norm (Zhang and Sennrich 2019): rms(x) = sqrt(mean(x^2) + eps). */

INLINE void norm_row(const norm_call_t *call, int64_t y, int64_t x, int is_half) {
  const int64_t width = call->width, whole = width / LANES * LANES;
  vf squares = splat(0.0f);
  for (int64_t i = 0; i < whole; i += LANES) {
    vf v = loadv(call->x, x + i, is_half);
    squares = fmav(v, v, squares);
  }
  float sum = sum_lanes(squares);
  for (int64_t i = whole; i < width; i++) {
    float v = load1(call->x, x + i, is_half);
    sum = fma1(v, v, sum);
  }
  float scale = 1.0f / sqrtf(sum / (float)width + (float)call->eps);
  if (!is_half) {
    float *out = (float *)call->y + y;
    for (int64_t i = 0; i < whole; i += LANES)
      *(vf_any *)(out + i) =
          loadv(call->x, x + i, 0) * splat(scale) * *(const vf_any *)(call->weight + i);
  }
  for (int64_t i = is_half ? 0 : whole; i < width; i++)
    store1(call->y, y + i, load1(call->x, x + i, is_half) * scale * call->weight[i], is_half);
}

static void norm_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  const norm_call_t *call = opaque;
  int64_t stop = (id + 1) * ROWS_PER_TASK;
  if (stop > call->num_rows) stop = call->num_rows;
  for (int64_t row = id * ROWS_PER_TASK; row < stop; row++) {
    int64_t y = row / call->inner * call->y_stride + row % call->inner * call->y_inner;
    int64_t x = row / call->inner * call->x_stride + row % call->inner * call->x_inner;
    if (call->is_half)
      norm_row(call, y, x, 1);
    else
      norm_row(call, y, x, 0);
  }
}

int64_t polyadapt_rms_norm(const norm_call_t *call) {
  int64_t threads = call->num_rows * call->width < COST_TO_THREAD ? 1 : call->threads;
  run_tasks(norm_task, (void *)call, (call->num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, threads);
  return 0;
}

/* ---------------------------------------------------------------- y = act(gate) * up
 * x holds gate [width] and then up [width] in each row. */

INLINE void act_row(const act_call_t *call, int64_t row, int kind, int is_half) {
  const int64_t x = row * call->x_stride, y = row * call->y_stride, width = call->width;
  for (int64_t i = 0; i < width; i += LANES) {
    float gate[LANES] = {0}, up[LANES] = {0}, out[LANES];
    int64_t num = width - i < LANES ? width - i : LANES;
    vf g, u;
    if (num == LANES) {
      g = loadv(call->x, x + i, is_half), u = loadv(call->x, x + width + i, is_half);
    } else {
      for (int64_t c = 0; c < num; c++)
        gate[c] = load1(call->x, x + i + c, is_half), up[c] = load1(call->x, x + width + i + c, is_half);
      memcpy(&g, gate, sizeof g), memcpy(&u, up, sizeof u);
    }
    vf value = activate(g, kind) * u;
    if (num == LANES && !is_half) {
      *(vf_any *)((float *)call->y + y + i) = value;
    } else {
      memcpy(out, &value, sizeof out);
      for (int64_t c = 0; c < num; c++) store1(call->y, y + i + c, out[c], is_half);
    }
  }
}

static void act_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  const act_call_t *call = opaque;
  int64_t stop = (id + 1) * ROWS_PER_TASK;
  if (stop > call->num_rows) stop = call->num_rows;
  for (int64_t row = id * ROWS_PER_TASK; row < stop; row++)
    if (call->kind == SILU)
      act_row(call, row, SILU, (int)call->is_half);
    else
      act_row(call, row, GELU_TANH, (int)call->is_half);
}

int64_t polyadapt_gated_activation(const act_call_t *call) {
  int64_t threads = call->num_rows * call->width < COST_TO_THREAD ? 1 : call->threads;
  run_tasks(act_task, (void *)call, (call->num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, threads);
  return 0;
}

/* ---------------------------------------------------------------- rotary embedding, in place
 * Su et al. 2021, in halves: of the first `rotary` elements of a head,
 *   x[i] = x[i] cos[i] - x[i + rotary/2] sin[i],  x[i + rotary/2] = x[i + rotary/2] cos[i + rotary/2]
 *                                                                  + x[i] sin[i + rotary/2]. */

INLINE void rope_head(const rope_call_t *call, int64_t x, int64_t angle, int is_half) {
  const int64_t half = call->rotary / 2;
  int64_t i = 0;
  if (!is_half)
    for (; i + LANES <= half; i += LANES) {
      float *low = (float *)call->x + x + i, *high = low + half;
      vf a = *(vf_any *)low, b = *(vf_any *)high;
      vf c0 = loadv(call->cos, angle + i, 0), s0 = loadv(call->sin, angle + i, 0);
      vf c1 = loadv(call->cos, angle + half + i, 0), s1 = loadv(call->sin, angle + half + i, 0);
      *(vf_any *)low = a * c0 - b * s0;
      *(vf_any *)high = b * c1 + a * s1;
    }
  for (; i < half; i++) {
    float a = load1(call->x, x + i, is_half), b = load1(call->x, x + half + i, is_half);
    float c0 = load1(call->cos, angle + i, is_half), s0 = load1(call->sin, angle + i, is_half);
    float c1 = load1(call->cos, angle + half + i, is_half), s1 = load1(call->sin, angle + half + i, is_half);
    store1(call->x, x + i, a * c0 - b * s0, is_half);
    store1(call->x, x + half + i, b * c1 + a * s1, is_half);
  }
}

static void rope_task(void *opaque, int64_t id, int64_t worker) {
  (void)worker;
  const rope_call_t *call = opaque;
  int64_t stop = (id + 1) * ROWS_PER_TASK;
  if (stop > call->num_rows) stop = call->num_rows;
  for (int64_t row = id * ROWS_PER_TASK; row < stop; row++)
    for (int64_t head = 0; head < call->num_heads; head++) {
      int64_t x = row * call->row_stride + head * call->head_stride;
      if (call->is_half)
        rope_head(call, x, row * call->angle_stride, 1);
      else
        rope_head(call, x, row * call->angle_stride, 0);
    }
}

int64_t polyadapt_rope(const rope_call_t *call) {
  int64_t size = call->num_rows * call->num_heads * call->rotary;
  run_tasks(rope_task, (void *)call, (call->num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK,
            size < COST_TO_THREAD ? 1 : call->threads);
  return 0;
}
