// Attention of a few queries a row over the cache: grouped heads, what is seen told by a number or by a mask.
#pragma once

#include <numeric>

#include "threads.h"
#include "vectors.h"

namespace farm {

constexpr int kQueries = 6;     // that share a reading of keys and values
constexpr int kPositions = 64;  // of which weights are held
constexpr int kValues = kRegisters == 32 ? 4 : 2;  // vectors of a value that are summed at once, for each query

template <class T>
struct Attention {
  const T *q, *k, *v, *mask;
  const int64_t* last;  // [B, T]: a token sees the entries up to that one; without it what the mask shows, or all
  T* out;
  int64_t sequences, tokens, kv_heads, group, size, context;
  int64_t q_sequence, q_token;      // strides in numbers
  int64_t kv_sequence, kv_head;     // of keys as of values
  int64_t mask_sequence, mask_row;  // a row for every query of a group; 0: one for all
};

// Lane by lane products of a query and a key, the lanes yet to be added.
template <class T, int kVectors>
inline Floats multiply_heads(const T* q, const T* k) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2 && kVectors % 2 == 0) {
    Floats dot = {};
    for (int i = 0; i < kVectors * kLanes; i += 2 * kLanes)
      dot = (Floats)_mm512_dpbf16_ps((__m512)dot, read<__m512bh>(q + i), read<__m512bh>(k + i));
    return dot;
  }
#endif
  Floats dot = {};
  for (int i = 0; i < kVectors * kLanes; i += kLanes) dot += load(q + i) * load(k + i);
  return dot;
}

// A few queries of one key/value head over all they see: a running softmax over blocks of positions (arXiv 2205.14135,
// algorithm 1). What the mask hides weighs exactly 0, and nothing behind the last position that is seen is read.
template <class T, int kVectors, int kCount>
struct Softmax {
  Softmax(const Attention<T>& a, int64_t b, int64_t g, int64_t first) : a(a), b(b), g(g), first(first) {}

  const Attention<T>& a;
  const int64_t b, g, first;
  const T *keys = a.k + b * a.kv_sequence + g * a.kv_head, *values = a.v + b * a.kv_sequence + g * a.kv_head;
  const T* q[kCount];
  int64_t until[kCount];
  Floats sums[kCount][kVectors] = {};
  float highest[kCount], total[kCount] = {};
  alignas(64) float weights[kCount][kPositions];

  void run() {
    for (int j = 0; j < kCount; j++) {
      const int64_t r = (first + j) / a.tokens, t = (first + j) % a.tokens;
      q[j] = a.q + b * a.q_sequence + t * a.q_token + (g * a.group + r) * a.size;
      highest[j] = -INFINITY;
      until[j] = a.last ? a.last[b * a.tokens + t] + 1 : a.mask ? shown(j) : a.context;
    }
    int64_t end = 0;
    for (int j = 0; j < kCount; j++) end = until[j] > end ? until[j] : end;
    for (int64_t start = 0; start < end; start += kPositions) {
      const int64_t positions = end - start < kPositions ? end - start : kPositions;
      for (int j = 0; j < kCount; j++) weigh(j, start, positions);
      constexpr int kAtOnce = kVectors % kValues ? kVectors % kValues : kValues;
      for (int i = 0; i < kVectors; i += kAtOnce) add<kAtOnce>(i, start, positions);
    }
    for (int j = 0; j < kCount; j++) {
      const int64_t r = (first + j) / a.tokens, t = (first + j) % a.tokens;
      T* out = a.out + ((b * a.tokens + t) * a.kv_heads * a.group + g * a.group + r) * a.size;
      const float share = total[j] > 0 ? 1 / total[j] : 0;
      for (int i = 0; i < kVectors; i++) store(out + i * kLanes, sums[j][i] * share);
    }
  }

  const T* mask_of(int j) const { return a.mask + b * a.mask_sequence + (first + j) * a.mask_row; }

  int64_t shown(int j) const {
    for (int64_t s = a.context; s > 0; s--)
      if (float(mask_of(j)[s - 1]) != -INFINITY) return s;
    return 0;
  }

  // Asks for what is read next: this position's values, and keys a block ahead.
  void fetch(int64_t position) const {
    for (int64_t i = 0; i < kVectors * kLanes; i += 64 / sizeof(T)) {
      __builtin_prefetch(values + position * a.size + i);
      __builtin_prefetch(keys + (position + kPositions) * a.size + i);
    }
  }

  // The weights of a block of positions, and what was summed before on their scale.
  void weigh(int j, int64_t start, int64_t positions) {
    const int64_t own = until[j] - start < positions ? until[j] - start : positions;
    if (own <= 0) {
      std::memset(weights[j], 0, sizeof weights[j]);
      return;
    }
    const float root = 1 / std::sqrt((float)a.size);
    Floats scores[kPositions / kLanes], most = Floats{} + highest[j], sum_of = {};
    for (int64_t s = 0; s < positions; s += kLanes) {
      Floats dots[kLanes];
      for (int lane = 0; lane < kLanes; lane++) {
        const int64_t at = s + lane < own ? s + lane : own - 1;
        if (j == 0) fetch(start + at);
        dots[lane] = multiply_heads<T, kVectors>(q[j], keys + (start + at) * a.size);
      }
      Floats score = sum_each(dots) * root;
      if (!a.last && a.mask) score += load_some(mask_of(j) + start + s, positions - s);
      score = kLane + (int)s < (int)own ? score : Floats{} - INFINITY;
      most = score > most ? score : most;
      scores[s / kLanes] = score;
    }
    float peak = most[0];
    for (int lane = 1; lane < kLanes; lane++) peak = most[lane] > peak ? most[lane] : peak;
    const float scale = peak == -INFINITY ? 1 : std::exp(highest[j] - peak);
    for (int64_t s = 0; s < positions; s += kLanes) {
      const Floats score = scores[s / kLanes];
      const Floats weight = score == -INFINITY ? Floats{} : exponential(score - peak);
      store(weights[j] + s, weight);
      sum_of += weight;
    }
    total[j] = total[j] * scale + sum(sum_of);
    for (int i = 0; i < kVectors; i++) sums[j][i] *= scale;
    highest[j] = peak;
  }

  template <int kAtOnce>
  void add(int from, int64_t start, int64_t positions) {
    Floats sum_of[kCount][kAtOnce];
    for (int j = 0; j < kCount; j++)
      for (int i = 0; i < kAtOnce; i++) sum_of[j][i] = sums[j][from + i];
    for (int64_t s = 0; s < positions; s++) {
      const T* value = values + (start + s) * a.size + from * kLanes;
      Floats loaded[kAtOnce];
      for (int i = 0; i < kAtOnce; i++) loaded[i] = load(value + i * kLanes);
      for (int j = 0; j < kCount; j++)
        for (int i = 0; i < kAtOnce; i++) sum_of[j][i] += loaded[i] * weights[j][s];
    }
    for (int j = 0; j < kCount; j++)
      for (int i = 0; i < kAtOnce; i++) sums[j][from + i] = sum_of[j][i];
  }
};

template <class T, int kVectors, int kCount = kQueries>
void attend_some(const Attention<T>& a, int64_t b, int64_t g, int64_t first, int64_t count) {
  if constexpr (kCount > 1)
    if (count < kCount) return attend_some<T, kVectors, kCount - 1>(a, b, g, first, count);
  Softmax<T, kVectors, kCount>(a, b, g, first).run();
}

// Into how many tiles the queries of one sequence's key/value head go, so that threads get as much work each.
inline int64_t tiles_of(int64_t queries, int64_t heads, int64_t threads) {
  const int64_t least = (queries + kQueries - 1) / kQueries, step = threads / std::gcd(heads, threads);
  const int64_t even = (least + step - 1) / step * step;
  return even < queries ? even : queries;
}

template <class T>
void attend(Thread& thread, const Attention<T>& a) {
  const int64_t queries = a.group * a.tokens, heads = a.sequences * a.kv_heads;
  const int64_t tiles = tiles_of(queries, heads, thread.count());
  thread.each(heads * tiles, [&](int64_t task) {
    const int64_t b = task / (a.kv_heads * tiles), g = task / tiles % a.kv_heads, tile = task % tiles;
    const int64_t first = queries * tile / tiles, count = queries * (tile + 1) / tiles - first;
    switch (a.size) {
      case 16: return attend_some<T, 16 / kLanes>(a, b, g, first, count);
      case 32: return attend_some<T, 32 / kLanes>(a, b, g, first, count);
      case 64: return attend_some<T, 64 / kLanes>(a, b, g, first, count);
      case 96: return attend_some<T, 96 / kLanes>(a, b, g, first, count);
      case 128: return attend_some<T, 128 / kLanes>(a, b, g, first, count);
    }
  });
}

}  // namespace farm
