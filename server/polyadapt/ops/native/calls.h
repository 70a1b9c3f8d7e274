/* The argument blocks of the kernels, and their entries.
 *
 * One block of 64-bit fields each: a foreign call with many arguments costs more than the rest of a
 * wrapper. The orders are those of the Python beside this file. Strides count elements; `is_half` means bfloat16.
 */
#ifndef POLYADAPT_CALLS_H
#define POLYADAPT_CALLS_H

#include <stdint.h>

typedef struct {
  void *y;
  const void *x, *w;
  const float *bias; /* may be NULL */
  int64_t y_stride, x_stride, num_rows, num_out, num_in;
  int64_t is_half, w_half, threads;
} linear_call_t;

/* y = x / rms(x) * weight; rows lie in groups of `inner`, each with its own strides. */
typedef struct {
  void *y;
  const void *x;
  const float *weight;
  int64_t y_stride, x_stride, inner, y_inner, x_inner, num_rows, width, is_half, threads;
  double eps;
} norm_call_t;

/* y = act(gate) * up */
typedef struct {
  void *y;
  const void *x;
  int64_t y_stride, x_stride, num_rows, width, kind, is_half, threads;
} act_call_t;

/* Rotary embedding in place. */
typedef struct {
  void *x;
  const void *cos, *sin;
  int64_t row_stride, head_stride, angle_stride, num_rows, num_heads, rotary, is_half, threads;
} rope_call_t;

typedef struct {
  /* gate and table may be 0, and x or ids */
  int64_t y, x, ids, arena, cells, rows, bounds, slots, scales, gate, table;
  int64_t usage; /* float [num_slots, 1 + USAGE_BUCKETS], or 0 */
  int64_t parts; /* num_parts of part_t */
  int64_t y_stride, x_stride, gate_stride, table_stride; /* in elements */
  int64_t gate_width, table_width, num_rows, num_in, num_columns, num_parts, num_positions, arena_size, num_slots, num_sites,
      num_segments, is_y_half, is_arena_half, threads;
} gated_call_t;

/* A site and the columns of y that are its own. Sites that share their input share one call. */
typedef struct {
  int64_t site, column, num_out;
} part_t;

/* One part of one cell for the rows of one segment; what a kernel does not need is 0. */
typedef struct {
  void *y;
  const void *x, *w;
  const int32_t *rows;
  int64_t y_stride, x_stride, num_positions, num_rows, num_in, num_out, group, is_half, w_half, threads;
  double scale;
} override_call_t;

/* Rows of one slot whose MLPs are experts: positions start to stop - 1 in `rows`, and their first row of h. */
typedef struct {
  int64_t slot, start, stop, first;
} mixture_t;

/* One MLP of the segments' rows: x [rows, num_in] makes u [rows, columns], that inner [rows, width], and that y
 * [rows, num_out]. What a kernel does not need is 0. */
typedef struct {
  int64_t inner, u, x, y, h, arena, cells, rows;
  int64_t bias, usage; /* may be 0: float [num_out] of down, and as in gated_call_t */
  int64_t segments;    /* num_segments of mixture_t */
  int64_t parts;       /* num_parts of part_t: the columns of u; the first has the router */
  int64_t inner_stride, u_stride, x_stride, y_stride, h_stride; /* a row of h ends with the sum of the weights */
  int64_t num_segments, num_positions, num_rows, num_h_rows, num_in, width, num_out, num_parts, down, arena_size,
      num_slots, num_sites, is_gated, activation, is_half, is_arena_half, threads;
} mixture_call_t;

/* How a cell's components are weighed: ops/cells.py, Routing, taken apart. */
enum { ROUTER_SOFTMAX = 1, ROUTER_SIGMOID, ROUTER_MAGNITUDE, ROUTER_TABLE, ROUTER_EXPERTS, ROUTER_HINGE };
enum { MAX_CHOICES = 4096, USAGE_BUCKETS = 64 }; /* ops/cells.py has both */

typedef struct {
  int64_t router, renormalise, top_k, num_scores, column;
  int64_t num_rows; /* of the router in the cell, behind A's */
  float value;
} routing_t;

routing_t polyadapt_routing(int64_t code);
/* scores [num_scores] of a softmax, magnitude or experts router become the weights of its experts. */
void polyadapt_choose(const routing_t *routing, float *scores);
/* weights [rank] of the components; scores [num_scores] are those of TABLE already, else they are used up.
 * bias [rank] or NULL. At most MAX_CHOICES components, a multiple of num_scores. */
void polyadapt_weigh(const routing_t *routing, int64_t rank, float *scores, const void *bias, int bias_half,
                     float *weights);

/* h [rank], the products with A, become max(h - thresholds - max(value - score, 0), 0); thresholds [rank] and score,
 * of which HINGE has one where it has a router, may be NULL. */
void polyadapt_hinge(const routing_t *routing, int64_t rank, float *h, const float *score, const void *thresholds,
                     int thresholds_half);

/* Count a row of `slot` and add up what each of its num_scores experts weighed, in as many buckets at most.
 * weights [num]: of the experts, or of their components, so many of each. */
void polyadapt_note_usage(float *usage, int64_t slot, const float *weights, int64_t num, int64_t num_scores);

int64_t polyadapt_linear(const linear_call_t *call);
int64_t polyadapt_rms_norm(const norm_call_t *call);
int64_t polyadapt_gated_activation(const act_call_t *call);
int64_t polyadapt_rope(const rope_call_t *call);
int64_t polyadapt_gated_matmul(const gated_call_t *call);
int64_t polyadapt_mix(const mixture_call_t *call);
int64_t polyadapt_add_mixed(const mixture_call_t *call);
int64_t polyadapt_block_transform(const override_call_t *call);
int64_t polyadapt_swap(const override_call_t *call);
int64_t polyadapt_add_dense(const override_call_t *call);
int64_t polyadapt_paged_attention(void *out, const void *q, const void *k, const void *v,
                                  const int32_t *page_table, const int32_t *kv_lens, const float *sinks,
                                  const int64_t *strides, int64_t page_stride, int64_t num_sequences,
                                  int64_t num_heads, int64_t num_kv_heads, int64_t d, int64_t dv,
                                  int64_t num_slots, int64_t max_pages, int64_t page_size, int64_t window,
                                  double scale, double softcap, int64_t is_half, int64_t threads);

#endif
