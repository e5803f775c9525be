// As many numbers at once as a register of the machine holds; float32 or bfloat16 in memory, float32 in between.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512BF16__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace farm {

// A vector is one register: compilers keep wider ones in memory, and every product then goes through it.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <int... kIndices>
constexpr Ints in_order(std::integer_sequence<int, kIndices...>) {
  return Ints{kIndices...};
}

constexpr Ints kLane = in_order(std::make_integer_sequence<int, kLanes>());

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

// The compiler is to keep a vector in a register, as it is.
template <class Vector>
inline void stay(Vector& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__SSE2__)
  asm("" : "+x"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
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

// What is left of a number that has been in memory.
template <class T>
inline Floats rounded(Floats x) {
  if constexpr (sizeof(T) == sizeof(float))
    return x;
  else
    return widen(narrow(x));
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

// x y + sum, rounded once where the machine can: compilers decide that anew for every place, and a row's bits would
// depend on how many rows it is worked out with.
inline Floats multiply_add(Floats x, Floats y, Floats sum) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)y);
#else
  return x * y + sum;
#endif
}

// Adds the lanes of two vectors in pairs `kApart` apart: what came of x and of y stands side by side in runs of kApart.
template <int kApart>
inline Floats fold(Floats x, Floats y) {
  const Ints from_x = (kLane & ~(2 * kApart - 1)) | (kLane & (kApart - 1)), is_y = kLane & kApart;
  const Ints low = is_y ? from_x + kLanes : from_x;
#ifdef __clang__
  Floats sums;
  for (int lane = 0; lane < kLanes; lane++) {
    const Floats& from = low[lane] < kLanes ? x : y;
    sums[lane] = from[low[lane] % kLanes] + from[low[lane] % kLanes + kApart];
  }
  return sums;
#else
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, low + kApart);
#endif
}

// Lane i is the sum of the lanes of vector i.
template <int kApart = 1>
inline Floats sum_each(const Floats* x) {
  if constexpr (kApart == kLanes) {
    return x[0];
  } else {
    constexpr int kLeft = kLanes / (2 * kApart);
    Floats folded[kLeft];
    for (int i = 0; i < kLeft; i++) folded[i] = fold<kApart>(x[2 * i], x[2 * i + 1]);
    return sum_each<2 * kApart>(folded);
  }
}

template <int kApart = kLanes / 2>
inline float sum(Floats x) {
  x = fold<kApart>(x, x);
  if constexpr (kApart == 1)
    return x[0];
  else
    return sum<kApart / 2>(x);
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

inline bool any(Ints mask) {
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; lane++) found |= mask[lane];
  return found;
}

inline Floats silu(Floats x) { return x / (1.f + exponential(-x)); }

}  // namespace farm
