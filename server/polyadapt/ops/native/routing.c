/* The computed gates of one row: what its scores make of a cell's components. See ops/cells.py, Router.
 *
 * Sums go over scores or components in order, and of equal values the first is the larger: a row's weights
 * depend on that row alone.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "vector.h"

enum { HAS_RENORMALISE = 1 << 4, HAS_ROUTER = 1 << 5, IS_NEGATIVE = 1 << 6, FIELD = (1 << 12) - 1 };

routing_t polyadapt_routing(int64_t code) {
  routing_t routing = {.router = code & 15, .renormalise = (code & HAS_RENORMALISE) != 0,
                       .top_k = code >> 8 & FIELD, .num_scores = code >> 20 & FIELD, .column = code >> 32};
  routing.num_rows = code & HAS_ROUTER ? routing.num_scores : 0;
  uint32_t bits = (uint32_t)(code >> 32) | (code & IS_NEGATIVE ? 0x80000000u : 0);
  memcpy(&routing.value, &bits, sizeof bits);
  return routing;
}

/* A float as an integer of the same order; both zeros are equal. */
INLINE uint32_t order_of(float value) {
  uint32_t bits;
  value += 0.0f;
  memcpy(&bits, &value, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The top_k-th largest of the values, as order_of it: bit by bit, so that many of many cost no square. */
static uint32_t find_threshold(const float *values, int64_t num, int64_t top_k) {
  uint32_t threshold = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const uint32_t candidate = threshold | (uint32_t)1 << bit;
    int64_t count = 0;
    for (int64_t i = 0; i < num; i++) count += order_of(values[i]) >= candidate;
    if (count >= top_k) threshold = candidate;
  }
  return threshold;
}

/* One bit per value: whether it is among the `top_k` largest. */
static void keep_largest(const float *values, int64_t num, int64_t top_k, uint64_t *kept) {
  int is_all = top_k <= 0 || top_k >= num;
  memset(kept, is_all ? 0xff : 0, (size_t)(num + 63) / 64 * sizeof *kept);
  if (is_all) return;
  const uint32_t threshold = find_threshold(values, num, top_k);
  int64_t num_equal = top_k;
  for (int64_t i = 0; i < num; i++) num_equal -= order_of(values[i]) > threshold;
  for (int64_t i = 0; i < num; i++) {
    const uint32_t order = order_of(values[i]);
    if (order > threshold || (order == threshold && num_equal-- > 0)) kept[i / 64] |= (uint64_t)1 << (i % 64);
  }
}

INLINE int is_kept(const uint64_t *kept, int64_t i) { return (int)(kept[i / 64] >> (i % 64) & 1); }

/* values[i] = exp(values[i] - the largest) / their sum, over the kept ones; the others 0. */
static void softmax_kept(float *values, int64_t num, const uint64_t *kept) {
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t i = 0; i < num; i++)
    if (is_kept(kept, i) && values[i] > largest) largest = values[i];
  for (int64_t i = 0; i < num; i++) {
    values[i] = is_kept(kept, i) ? expf(values[i] - largest) : 0.0f;
    sum += values[i];
  }
  for (int64_t i = 0; i < num; i++) values[i] /= sum;
}

typedef struct {
  uint32_t order;
  int32_t index;
} ranked_t;

/* The larger first, and of equal ones the first. */
static int compare_ranked(const void *one, const void *other) {
  const ranked_t *a = one, *b = other;
  if (a->order != b->order) return a->order > b->order ? -1 : 1;
  return a->index < b->index ? -1 : 1;
}

/* One bit per value: whether it is among the largest that it takes for a sum above `mass`. */
static void keep_mass(const float *values, int64_t num, float mass, uint64_t *kept) {
  ranked_t ranked[MAX_CHOICES];
  for (int64_t i = 0; i < num; i++) ranked[i] = (ranked_t){order_of(values[i]), (int32_t)i};
  qsort(ranked, (size_t)num, sizeof *ranked, compare_ranked);
  memset(kept, 0, (size_t)(num + 63) / 64 * sizeof *kept);
  float sum = 0.0f;
  for (int64_t n = 0; n < num && sum <= mass; n++) {
    const int64_t best = ranked[n].index;
    kept[best / 64] |= (uint64_t)1 << (best % 64);
    sum += values[best];
  }
}

static void divide_kept(float *values, int64_t num, const uint64_t *kept, int is_divided) {
  float sum = 0.0f;
  for (int64_t i = 0; i < num; i++) {
    if (!is_kept(kept, i)) values[i] = 0.0f;
    sum += values[i];
  }
  if (!is_divided) return;
  if (fabsf(sum) < FLT_MIN) sum = FLT_MIN;
  for (int64_t i = 0; i < num; i++) values[i] /= sum;
}

void polyadapt_choose(const routing_t *routing, float *scores) {
  const int64_t num = routing->num_scores;
  uint64_t kept[MAX_CHOICES / 64];
  if (routing->router == ROUTER_MAGNITUDE) {
    for (int64_t e = 0; e < num; e++) scores[e] = fabsf(scores[e]);
    keep_largest(scores, num, routing->top_k, kept);
    for (int64_t e = 0; e < num; e++) scores[e] /= routing->value;
    softmax_kept(scores, num, kept);
    return;
  }
  keep_largest(scores, num, 0, kept);
  softmax_kept(scores, num, kept);
  if (routing->router == ROUTER_EXPERTS && routing->value > 0.0f)
    keep_mass(scores, num, routing->value, kept);
  else
    keep_largest(scores, num, routing->top_k, kept);
  divide_kept(scores, num, kept, (int)routing->renormalise);
}

void polyadapt_weigh(const routing_t *routing, int64_t rank, float *scores, const void *bias, int bias_half,
                     float *weights) {
  const int64_t repeats = rank / routing->num_scores;
  if (routing->router == ROUTER_SIGMOID) {
    uint64_t kept[MAX_CHOICES / 64];
    for (int64_t i = 0; i < rank; i++) {
      weights[i] = 1.0f / (1.0f + expf(-scores[i / repeats]));
      if (bias) weights[i] += load1(bias, i, bias_half);
    }
    keep_largest(weights, rank, routing->top_k, kept);
    divide_kept(weights, rank, kept, 1);
    return;
  }
  if (routing->router != ROUTER_TABLE) polyadapt_choose(routing, scores);
  for (int64_t i = 0; i < rank; i++) weights[i] = scores[i / repeats];
}

void polyadapt_hinge(const routing_t *routing, int64_t rank, float *h, const float *score, const void *thresholds,
                     int thresholds_half) {
  float veto = score ? routing->value - *score : 0.0f;
  if (veto < 0.0f) veto = 0.0f;
  for (int64_t i = 0; i < rank; i++) {
    float own = h[i];
    if (thresholds) own -= load1(thresholds, i, thresholds_half);
    own -= veto;
    h[i] = own < 0.0f ? 0.0f : own; /* NaN stays */
  }
}

void polyadapt_note_usage(float *usage, int64_t slot, const float *weights, int64_t num, int64_t num_scores) {
  float shares[USAGE_BUCKETS] = {0};
  float *of = usage + slot * (1 + USAGE_BUCKETS);
  const int64_t buckets = num_scores < USAGE_BUCKETS ? num_scores : USAGE_BUCKETS;
  for (int64_t i = 0; i < num; i++) {
    int64_t expert = i / (num / num_scores);
    shares[expert * buckets / num_scores] += weights[i] / (float)(num / num_scores);
  }
  /* Rows of one adapter may be with several threads. */
#pragma omp atomic
  of[0] += 1.0f;
  for (int64_t b = 0; b < buckets; b++)
    if (shares[b] != 0.0f) {
#pragma omp atomic
      of[1 + b] += shares[b];
    }
}
