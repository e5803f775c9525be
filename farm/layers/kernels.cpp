// What a decoding step computes on a CPU, for few rows: products, norms, rotary positions, attention over the cache.
//
// M rows, X inputs, Y outputs, H hidden, B sequences, T tokens of each, S positions read, G key/value heads,
// R query heads of each, D head size. Compiled for the machine it runs on by farm/layers/kernels.py, which checks shapes.
//
// A row's numbers do not depend on the other rows of a call: a token gets the same logits alone, in a batch and in the
// verification of a draft.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 2 * kLanes;  // outputs that a product computes at once
#ifdef __AVX512F__
constexpr int kRows = 12;  // 24 of 32 registers hold sums
#else
constexpr int kRows = 3;  // 12 of 16, where a register holds 8 lanes
#endif
constexpr int kQueries = 4;     // that share a reading of keys and values
constexpr int kPositions = 64;  // of which scores are held
// Below this much work a second thread costs more than it saves.
constexpr int64_t kWorkOfAThread = 1 << 15;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct bfloat16 {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

template <class Vector>
inline Vector read(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats widen(Halves bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }

inline Halves narrow(Floats x) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x;
  const Words even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? even : (bits >> 16) | 0x40, Halves);  // a NaN stays one
#endif
}

inline Floats load(const float* from) { return read<Floats>(from); }
inline Floats load(const bfloat16* from) { return widen(read<Halves>(from)); }
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(bfloat16* to, Floats x) {
  const Halves bits = narrow(x);
  std::memcpy(to, &bits, sizeof bits);
}

template <class T>
inline Floats load_some(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_some(T* to, Floats x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(to, lanes, count * sizeof(T));
}

// Adds the lanes of two vectors in pairs `kApart` apart: what came of x and of y stands side by side in runs of kApart.
template <int kApart>
inline Floats fold(Floats x, Floats y) {
  const Ints from_x = (kLane & ~(2 * kApart - 1)) | (kLane & (kApart - 1)), is_y = kLane & kApart;
  const Ints low = is_y ? from_x + kLanes : from_x;
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, low + kApart);
}

// Lane i is the sum of the lanes of vector i.
inline Floats sum_each(const Floats* x) {
  Floats pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; i++) pairs[i] = fold<1>(x[2 * i], x[2 * i + 1]);
  for (int i = 0; i < 4; i++) fours[i] = fold<2>(pairs[2 * i], pairs[2 * i + 1]);
  for (int i = 0; i < 2; i++) eights[i] = fold<4>(fours[2 * i], fours[2 * i + 1]);
  return fold<8>(eights[0], eights[1]);
}

inline float sum(Floats x) {
  x = fold<8>(x, x);
  x = fold<4>(x, x);
  x = fold<2>(x, x);
  return fold<1>(x, x)[0];
}

// e^x within 2e-7 of its value: 2^n times the series of what remains; beyond +-87 the value at 87.
inline Floats exponential(Floats x) {
  x = x < -87.f ? Floats{} - 87.f : x;
  x = x > 87.f ? Floats{} + 87.f : x;
  const Floats whole = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer, in the lowest bits
  const Floats n = whole - 12582912.f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats series = r * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  series = series * r * r + r + 1.f;
  return (Floats)((Ints)series + ((Ints)whole << 23));
}

inline Floats silu(Floats x) { return x / (1.f + exponential(-x)); }

// Multiplies one vector of weights with an input (of bfloat16 with two that lie side by side) and adds to the sums.
template <class T>
struct Product;

template <>
struct Product<float> {
  static constexpr int kInputs = 1;
  using Weights = Floats;
  static inline void add(Floats& sums, Weights weights, const float* x) { sums += weights * x[0]; }
};

template <>
struct Product<bfloat16> {
  static constexpr int kInputs = 2;
#ifdef __AVX512BF16__
  using Weights = __m512bh;
  static inline void add(Floats& sums, Weights weights, const bfloat16* x) {
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, weights, (__m512bh)_mm512_set1_epi32(read<int32_t>(x)));
  }
#else
  using Weights = Words;
  static inline void add(Floats& sums, Weights weights, const bfloat16* x) {
    const uint32_t pair = read<uint32_t>(x), low = pair << 16, high = pair & 0xffff0000u;
    sums += (Floats)(weights << 16) * read<float>(&low);
    sums += (Floats)(weights & 0xffff0000u) * read<float>(&high);
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
      return store_some(out, silu(left) * right, half - first);
    case kApart:
      store_some(out, left, half - first);
      return store_some(out + half, right, half - first);
  }
}

template <class T, int M>
void multiply(const Task<T>& task, int64_t row, int64_t block) {
  using P = Product<T>;
  const T* x = task.x + row * task.inputs;
  const T* w = task.weights + block * kBlock * task.inputs;
  Floats sums[M][2] = {};
  for (int64_t k = 0; k < task.inputs; k += P::kInputs, w += kBlock * P::kInputs) {
    auto first = read<typename P::Weights>(w), second = read<typename P::Weights>(w + kLanes * P::kInputs);
#ifdef __AVX512F__
    asm("" : "+v"(first), "+v"(second));  // they stay in registers: read again for every row they would be the limit
#endif
    __builtin_prefetch(w + 16 * kBlock * P::kInputs);
    __builtin_prefetch(w + (16 * kBlock + kLanes) * P::kInputs);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      P::add(sums[m][0], first, x + m * task.inputs + k);
      P::add(sums[m][1], second, x + m * task.inputs + k);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) put_block(task, row + m, block, sums[m][0], sums[m][1]);
}

template <class T, int M = kRows>
void multiply_rows(const Task<T>& task, int64_t row, int64_t block, int64_t count) {
  if constexpr (M > 1)
    if (count < M) return multiply_rows<T, M - 1>(task, row, block, count);
  multiply<T, M>(task, row, block);
}

template <class T>
void linear(const Task<T>& task, int threads) {
  const int64_t blocks = (task.outputs + kBlock - 1) / kBlock;
  const int64_t tiles = (task.rows + kRows - 1) / kRows, tile = (task.rows + tiles - 1) / tiles;
  const bool shared = task.rows * task.inputs * task.outputs >= kWorkOfAThread;
#pragma omp parallel for num_threads(threads) schedule(static) if (shared)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t row = 0; row < task.rows; row += tile)
      multiply_rows<T>(task, row, block, task.rows - row < tile ? task.rows - row : tile);
}

template <class T>
void rms_norm(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= kWorkOfAThread)
  for (int64_t row = 0; row < rows; row++) {
    const T* in = x + row * width;
    T* out = y + row * width;
    Floats squares = {};
    for (int64_t h = 0; h < width; h += kLanes) {
      const Floats value = load_some(in + h, width - h);
      squares += value * value;
    }
    const float scale = 1 / std::sqrt(sum(squares) / width + eps);
    for (int64_t h = 0; h < width; h += kLanes) {
      const Floats value = load_some(in + h, width - h);
      store_some(out + h, value * scale * load_some(weight + h, width - h), width - h);
    }
  }
}

template <class T>
void swiglu(const T* gate_up, T* y, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= kWorkOfAThread)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t f = 0; f < width; f += kLanes) {
      const T *gate = gate_up + row * 2 * width + f, *up = gate + width;
      const Floats value = silu(load_some(gate, width - f)) * load_some(up, width - f);
      store_some(y + row * width + f, value, width - f);
    }
}

// Rotates the first `rotated` of each row's heads in place; sin is negated in its first half.
template <class T>
void rotate(T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t rotated, int64_t size, int threads) {
  const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * rotated * size >= kWorkOfAThread)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = 0; head < rotated; head++) {
      T *first = x + (row * heads + head) * size, *second = first + half;
      const T *c = cos + row * size, *s = sin + row * size;
      for (int64_t d = 0; d < half; d += kLanes) {
        const int64_t count = half - d;
        const Floats a = load_some(first + d, count), b = load_some(second + d, count);
        store_some(first + d, a * load_some(c + d, count) + b * load_some(s + d, count), count);
        store_some(second + d, b * load_some(c + half + d, count) + a * load_some(s + half + d, count), count);
      }
    }
}

// Keys and values of each row into the cache: `heads` vectors of `bytes` a row, to the entries named.
void keep(const char* kv, int64_t row_bytes, const int64_t* entries, char* cache, int64_t rows, int64_t heads,
          int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * heads * bytes >= kWorkOfAThread)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = 0; head < heads; head++)
      std::memcpy(cache + entries[row * heads + head] * bytes, kv + row * row_bytes + head * bytes, bytes);
}

template <class T>
struct Attention {
  const T *q, *k, *v, *mask;  // no mask: all is seen
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
  Floats sums[kCount][kVectors] = {};
  float highest[kCount], total[kCount] = {};
  alignas(64) float weights[kCount][kPositions];

  void run() {
    for (int j = 0; j < kCount; j++) {
      const int64_t r = (first + j) / a.tokens, t = (first + j) % a.tokens;
      q[j] = a.q + b * a.q_sequence + t * a.q_token + (g * a.group + r) * a.size;
      highest[j] = -INFINITY;
    }
    for (int64_t start = 0, end = seen(); start < end; start += kPositions) {
      const int64_t positions = end - start < kPositions ? end - start : kPositions;
      for (int j = 0; j < kCount; j++) weigh(j, start, positions);
      constexpr int kAtOnce = kVectors % 4 ? kVectors % 4 : 4;
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

  int64_t seen() const {
    int64_t end = a.mask ? 0 : a.context;
    for (int j = 0; j < kCount && end < a.context; j++)
      for (int64_t s = a.context; s > end; s--)
        if (float(mask_of(j)[s - 1]) != -INFINITY) end = s;
    return end;
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
    const float root = 1 / std::sqrt((float)a.size);
    Floats scores[kPositions / kLanes], most = Floats{} + highest[j], sum_of = {};
    for (int64_t s = 0; s < positions; s += kLanes) {
      Floats dots[kLanes];
      for (int lane = 0; lane < kLanes; lane++) {
        const int64_t at = s + lane < positions ? s + lane : positions - 1;
        if (j == 0) fetch(start + at);
        dots[lane] = multiply_heads<T, kVectors>(q[j], keys + (start + at) * a.size);
      }
      Floats score = sum_each(dots) * root;
      if (a.mask) score += load_some(mask_of(j) + start + s, positions - s);
      score = kLane + (int)s < (int)positions ? score : Floats{} - INFINITY;
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

template <class T>
void attend(const Attention<T>& a, int threads) {
  const int64_t queries = a.group * a.tokens, tiles = (queries + kQueries - 1) / kQueries;
  const int64_t tasks = a.sequences * a.kv_heads * tiles;
  const bool shared = tasks * a.context * a.size >= kWorkOfAThread;
#pragma omp parallel for num_threads(threads) schedule(static) if (shared)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t b = task / (a.kv_heads * tiles), g = task / tiles % a.kv_heads, first = task % tiles * kQueries;
    switch (a.size / kLanes) {
      case 1: attend_some<T, 1>(a, b, g, first, queries - first); break;
      case 2: attend_some<T, 2>(a, b, g, first, queries - first); break;
      case 4: attend_some<T, 4>(a, b, g, first, queries - first); break;
      case 6: attend_some<T, 6>(a, b, g, first, queries - first); break;
      case 8: attend_some<T, 8>(a, b, g, first, queries - first); break;
    }
  }
}

}  // namespace

#define FOR(T, name)                                                                                            \
  extern "C" void linear_##name(const T* x, const T* weights, const T* bias, const T* residual, T* y,           \
                                int64_t rows, int64_t inputs, int64_t outputs, int64_t form, int threads) {     \
    linear<T>({x, weights, bias, residual, y, rows, inputs, outputs, (Form)form}, threads);                     \
  }                                                                                                             \
  extern "C" void rms_norm_##name(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps,    \
                                  int threads) {                                                                \
    rms_norm(x, weight, y, rows, width, eps, threads);                                                          \
  }                                                                                                             \
  extern "C" void swiglu_##name(const T* gate_up, T* y, int64_t rows, int64_t width, int threads) {             \
    swiglu(gate_up, y, rows, width, threads);                                                                   \
  }                                                                                                             \
  extern "C" void rotate_##name(T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t rotated, \
                                  int64_t size, int threads) {                                                  \
    rotate(x, cos, sin, rows, heads, rotated, size, threads);                                                   \
  }                                                                                                             \
  extern "C" void attend_##name(const Attention<T>* attention, int threads) { attend(*attention, threads); }

FOR(float, float32)
FOR(bfloat16, bfloat16)

extern "C" void keep_bytes(const char* kv, int64_t row_bytes, const int64_t* entries, char* cache, int64_t rows,
                           int64_t heads, int64_t bytes, int threads) {
  keep(kv, row_bytes, entries, cache, rows, heads, bytes, threads);
}
