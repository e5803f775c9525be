// Products of a few rows with weights that lie as farm/layers/kernels.py packs them.
#pragma once

#include "ahead.h"
#include "threads.h"
#include "vectors.h"

namespace farm {

constexpr int kBlock = 2 * kLanes;  // outputs that a product computes at once
constexpr int kAhead = 16;  // inputs whose weights are asked for before they are needed
constexpr int kFetch = 8;   // inputs after which some of what comes next is asked for

// Multiplies one vector of weights with an input (of bfloat16 with two that lie side by side) and adds to the sums.
template <class T>
struct Product;

template <>
struct Product<float> {
  static constexpr int kInputs = 1, kRows = kRegisters == 32 ? 12 : 6;  // rows at once, two registers of sums each
  using Weights = Floats;
  static inline void add(Floats& sums, Weights weights, const float* x) { sums += weights * x[0]; }
};

template <>
struct Product<bfloat16> {
  static constexpr int kInputs = 2, kRows = kRegisters == 32 ? 12 : 4;  // widened weights take registers too
#ifdef __AVX512BF16__
  using Weights = __m512bh;
  static inline void add(Floats& sums, Weights weights, const bfloat16* x) {
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, weights, (__m512bh)_mm512_set1_epi32(read<int32_t>(x)));
  }
#else
  using Weights = Words;
  static inline void add(Floats& sums, Weights weights, const bfloat16* x) {
    Words pair = Words{} + read<uint32_t>(x);
    stay(pair);  // or it would be shifted as a number and then moved to a vector, twice
    sums += (Floats)(weights << 16) * (Floats)(pair << 16);
    sums += (Floats)(weights & 0xffff0000u) * (Floats)(pair & 0xffff0000u);
  }
#endif
};

// How the sums of a block of outputs leave a product.
enum Form : int64_t {
  kAsTheyAre = 0,
  kGated = 1,  // the first half of a block is G x, the second U x of as many: silu(G x) * (U x) leaves
  kApart = 2,  // G x of all blocks, then U x of all
};

template <class T>
struct Task {
  const T *x, *weights, *bias, *residual;
  T* y;
  int64_t rows, inputs, outputs;
  Form form;
};

template <class T>
inline void put(const Task<T>& task, int64_t row, int64_t first, Floats sums) {
  const int64_t count = task.outputs - first;
  if (count <= 0) return;
  if (task.bias) sums += load_some(task.bias + first, count);
  if (task.residual) sums += load_some(task.residual + row * task.outputs + first, count);
  store_some(task.y + row * task.outputs + first, sums, count);
}

template <class T>
inline void put_block(const Task<T>& task, int64_t row, int64_t block, Floats left, Floats right) {
  const int64_t half = task.outputs / 2, first = block * kLanes;
  T* out = task.y + row * (task.form == kApart ? task.outputs : half) + first;
  switch (task.form) {
    case kAsTheyAre:
      put(task, row, block * kBlock, left);
      return put(task, row, block * kBlock + kLanes, right);
    case kGated:
      return store_some(out, silu(rounded<T>(left)) * rounded<T>(right), half - first);  // as kApart leaves them
    case kApart:
      store_some(out, left, half - first);
      return store_some(out + half, right, half - first);
  }
}

template <class T, int M>
void multiply(const Task<T>& task, int64_t row, int64_t block, Ahead* ahead) {
  using P = Product<T>;
  const T* x = task.x + row * task.inputs;
  const T* w = task.weights + block * kBlock * task.inputs;
  Floats sums[M][2] = {};
  for (int64_t k = 0; k < task.inputs; k += P::kInputs, w += kBlock * P::kInputs) {
    if (ahead && k % kFetch == 0) ahead->fetch();
    auto first = read<typename P::Weights>(w), second = read<typename P::Weights>(w + kLanes * P::kInputs);
    stay(first), stay(second);  // read again for every row they would be the limit
    constexpr int64_t kStep = kBlock * P::kInputs;
    for (int64_t i = 0; i < kStep; i += 64 / sizeof(T)) __builtin_prefetch(w + kAhead * kStep + i);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      P::add(sums[m][0], first, x + m * task.inputs + k);
      P::add(sums[m][1], second, x + m * task.inputs + k);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) put_block(task, row + m, block, sums[m][0], sums[m][1]);
}

template <class T, int M = Product<T>::kRows>
void multiply_rows(const Task<T>& task, int64_t row, int64_t block, int64_t count, Ahead* ahead) {
  if constexpr (M > 1)
    if (count < M) return multiply_rows<T, M - 1>(task, row, block, count, ahead);
  multiply<T, M>(task, row, block, ahead);
}

template <class T>
int64_t tiles_of_rows(const Task<T>& task) {
  return (task.rows + Product<T>::kRows - 1) / Product<T>::kRows;
}

// One block of outputs of all rows.
template <class T>
void multiply_block(const Task<T>& task, int64_t block, Ahead* ahead = nullptr) {
  const int64_t tiles = tiles_of_rows(task), tile = (task.rows + tiles - 1) / tiles;
  for (int64_t row = 0; row < task.rows; row += tile)
    multiply_rows<T>(task, row, block, task.rows - row < tile ? task.rows - row : tile, ahead);
}

// `ahead` is what this thread needs next.
template <class T>
void linear(Thread& thread, const Task<T>& task, Ahead* ahead = nullptr) {
  if (!task.rows) return;
  const int64_t blocks = (task.outputs + kBlock - 1) / kBlock;
  if (ahead) ahead->spread(blocks / thread.count() * tiles_of_rows(task) * (task.inputs / kFetch));
  thread.each(blocks, [&](int64_t block) { multiply_block(task, block, ahead); });
}

// As many products side by side, `task_of(i)` each, of at most `most` outputs.
template <class T, class TaskOf>
void linear_each(Thread& thread, int64_t count, int64_t most, const TaskOf& task_of) {
  const int64_t blocks = (most + kBlock - 1) / kBlock;
  thread.each(count * blocks, [&](int64_t i) {
    const Task<T> task = task_of(i / blocks);
    if (task.rows && i % blocks * kBlock < task.outputs) multiply_block(task, i % blocks);
  });
}

}  // namespace farm
