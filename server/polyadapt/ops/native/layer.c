/* One decoder layer for rows that each read the cache by themselves, in float32: the kernels of the other
 * files one after another, so that a step costs one foreign call a layer and no Python between products.
 *
 *   x += O attention(rope(norm_q(Q n)), rope(norm_k(K n)), V n)    n = rms_norm_1(x)
 *   x += D (act(G m) * U m)                                       m = rms_norm_2(x)
 * and each product with the adapters of its rows; a row's own experts may stand between G, U and D (mixture.c).
 * The arithmetic, its order and so its bits are those of the kernels called alone.
 */
#include <string.h>

#include "calls.h"

typedef struct {
  const void *w;
  const float *bias;
  const part_t *parts;
  int64_t num_parts, num_out, num_in, w_half;
} product_t;

typedef struct {
  product_t qkv, output, gate_up, down;
  const float *norms[2], *head_norms[2]; /* before attention and MLP; of query and key, or NULL */
  float *k_cache, *v_cache;              /* [num_slots, num_kv_heads, dim] */
  const float *sinks;
  int64_t num_slots, num_heads, num_kv_heads, dim, activation, window;
  double eps[2], head_eps[2], scale, softcap;
} layer_t;

typedef struct {
  int64_t bounds, slots, scales, gate, gate_stride, gate_width, table, table_stride, table_width, num_segments;
} lane_t;

/* Rows that the step has, and scratch for one layer. */
typedef struct {
  float *x, *normed, *qkv, *heads, *gate_up, *inner, *out;
  const float *cos, *sin;
  const int64_t *write_slots;
  const int32_t *page_table, *kv_lens;
  const lane_t *lanes;
  const mixture_t *mixtures;
  float *mixed; /* [num_mixed, mixed_width] */
  int64_t arena, cells, rows, num_positions, arena_size, num_adapter_slots, num_sites, arena_half;
  int64_t num_rows, rotary, page_stride, max_pages, page_size, num_lanes, usage;
  int64_t num_mixtures, num_mixed, mixed_width, threads;
} step_t;

static int64_t product(const step_t *step, const product_t *of, float *y, const float *x) {
  linear_call_t base = {.y = y, .x = x, .w = of->w, .bias = of->bias, .y_stride = of->num_out,
                        .x_stride = of->num_in, .num_rows = step->num_rows, .num_out = of->num_out,
                        .num_in = of->num_in, .w_half = of->w_half, .threads = step->threads};
  int64_t result = polyadapt_linear(&base);
  for (int64_t i = 0; i < step->num_lanes && !result; i++) {
    const lane_t *lane = &step->lanes[i];
    gated_call_t call = {.y = (int64_t)y, .x = (int64_t)x, .arena = step->arena, .cells = step->cells,
                         .rows = step->rows, .bounds = lane->bounds, .slots = lane->slots,
                         .scales = lane->scales, .gate = lane->gate, .table = lane->table,
                         .usage = step->usage,
                         .parts = (int64_t)of->parts, .y_stride = of->num_out, .x_stride = of->num_in,
                         .gate_stride = lane->gate_stride, .gate_width = lane->gate_width,
                         .table_stride = lane->table_stride, .table_width = lane->table_width,
                         .num_rows = step->num_rows, .num_in = of->num_in, .num_columns = of->num_out,
                         .num_parts = of->num_parts, .num_positions = step->num_positions,
                         .arena_size = step->arena_size, .num_slots = step->num_adapter_slots,
                         .num_sites = step->num_sites, .num_segments = lane->num_segments,
                         .is_arena_half = step->arena_half, .threads = step->threads};
    result = polyadapt_gated_matmul(&call);
  }
  return result;
}

/* What the rows of `mixtures` do instead of the activation, and then beside the down product. */
static mixture_call_t mixture(const layer_t *layer, const step_t *step) {
  const int64_t width = layer->down.num_in, hidden = layer->down.num_out;
  return (mixture_call_t){.inner = (int64_t)step->inner, .u = (int64_t)step->gate_up, .x = (int64_t)step->normed,
                          .y = (int64_t)step->out, .h = (int64_t)step->mixed, .arena = step->arena,
                          .cells = step->cells, .rows = step->rows, .bias = (int64_t)layer->down.bias,
                          .usage = step->usage, .segments = (int64_t)step->mixtures,
                          .parts = (int64_t)layer->gate_up.parts, .inner_stride = width, .u_stride = 2 * width,
                          .x_stride = layer->gate_up.num_in, .y_stride = hidden, .h_stride = step->mixed_width,
                          .num_segments = step->num_mixtures, .num_positions = step->num_positions,
                          .num_rows = step->num_rows, .num_h_rows = step->num_mixed,
                          .num_in = layer->gate_up.num_in, .width = width, .num_out = hidden,
                          .num_parts = layer->gate_up.num_parts, .down = layer->down.parts[0].site,
                          .arena_size = step->arena_size, .num_slots = step->num_adapter_slots,
                          .num_sites = step->num_sites, .is_gated = 1, .activation = layer->activation,
                          .is_arena_half = step->arena_half, .threads = step->threads};
}

static void norm(const step_t *step, float *y, const float *x, const float *weight, double eps,
                 int64_t width, int64_t inner, int64_t stride) {
  norm_call_t call = {.y = y, .x = x, .weight = weight, .y_stride = stride, .x_stride = stride,
                      .inner = inner, .y_inner = width, .x_inner = width,
                      .num_rows = step->num_rows * inner, .width = width, .threads = step->threads,
                      .eps = eps};
  polyadapt_rms_norm(&call);
}

static void rope(const step_t *step, float *x, int64_t row_stride, int64_t num_heads, int64_t dim) {
  rope_call_t call = {.x = x, .cos = step->cos, .sin = step->sin, .row_stride = row_stride,
                      .head_stride = dim, .angle_stride = step->rotary, .num_rows = step->num_rows,
                      .num_heads = num_heads, .rotary = step->rotary, .threads = step->threads};
  polyadapt_rope(&call);
}

static void add(float *x, const float *y, int64_t size) {
  for (int64_t i = 0; i < size; i++) x[i] += y[i];
}

enum { BAD_WRITE_SLOT = 1 };

/* 0, or the problem of the part that failed; `stage` then says which: 0 to 3 are the products in order, 4
 * is attention, 5 the step's own arguments, 6 the rows' own experts. x is whole again only where the result is
 * 0. */
int64_t polyadapt_layer(const layer_t *layer, const step_t *step, int64_t *stage) {
  const int64_t hidden = layer->qkv.num_in, dim = layer->dim, rows = step->num_rows;
  const int64_t heads = layer->num_heads, kv_heads = layer->num_kv_heads, row = layer->qkv.num_out;
  int64_t result;
  *stage = 5;
  for (int64_t t = 0; t < rows; t++)
    if (step->write_slots[t] < 0 || step->write_slots[t] >= layer->num_slots)
      return BAD_WRITE_SLOT + (t << 8);
  norm(step, step->normed, step->x, layer->norms[0], layer->eps[0], hidden, 1, hidden);
  *stage = 0;
  if ((result = product(step, &layer->qkv, step->qkv, step->normed))) return result;
  float *key = step->qkv + heads * dim, *value = key + kv_heads * dim;
  if (layer->head_norms[0]) {
    norm(step, step->qkv, step->qkv, layer->head_norms[0], layer->head_eps[0], dim, heads, row);
    norm(step, key, key, layer->head_norms[1], layer->head_eps[1], dim, kv_heads, row);
  }
  rope(step, step->qkv, row, heads + kv_heads, dim);
  const int64_t kv_size = kv_heads * dim;
  for (int64_t t = 0; t < rows; t++) {
    memcpy(layer->k_cache + step->write_slots[t] * kv_size, key + t * row, (size_t)kv_size * sizeof(float));
    memcpy(layer->v_cache + step->write_slots[t] * kv_size, value + t * row, (size_t)kv_size * sizeof(float));
  }
  const int64_t strides[6] = {row, dim, kv_size, dim, kv_size, dim};
  *stage = 4;
  if ((result = polyadapt_paged_attention(step->heads, step->qkv, layer->k_cache, layer->v_cache,
                                          step->page_table, step->kv_lens, layer->sinks, strides,
                                          step->page_stride, rows, heads, kv_heads, dim, dim,
                                          layer->num_slots, step->max_pages, step->page_size, layer->window,
                                          layer->scale, layer->softcap, 0, step->threads)))
    return result;
  *stage = 1;
  if ((result = product(step, &layer->output, step->out, step->heads))) return result;
  add(step->x, step->out, rows * hidden);
  norm(step, step->normed, step->x, layer->norms[1], layer->eps[1], hidden, 1, hidden);
  *stage = 2;
  if ((result = product(step, &layer->gate_up, step->gate_up, step->normed))) return result;
  const int64_t width = layer->down.num_in;
  act_call_t act = {.y = step->inner, .x = step->gate_up, .y_stride = width, .x_stride = 2 * width,
                    .num_rows = rows, .width = width, .kind = layer->activation, .threads = step->threads};
  polyadapt_gated_activation(&act);
  const mixture_call_t mix = mixture(layer, step);
  *stage = 6;
  if (step->num_mixtures && (result = polyadapt_mix(&mix))) return result;
  *stage = 3;
  if ((result = product(step, &layer->down, step->out, step->inner))) return result;
  *stage = 6;
  if (step->num_mixtures && (result = polyadapt_add_mixed(&mix))) return result;
  add(step->x, step->out, rows * hidden);
  return 0;
}
