// What lies between the matrix products of a training step on a CPU: RMSNorm, SwiGLU, cross-entropy, and attention inside
// documents, each forward and backward in one pass over memory. `kernels.py` builds this file and calls it; every kernel
// has its definition in PyTorch, and `tests/native/` holds the two together.
//
// Arithmetic is float32; tensors are float32 or bfloat16 (`T`). Vectors are the compiler's own (16 floats, which it cuts to
// what the processor has), so nothing here needs a certain processor; where AVX512-BF16 is there, its dot product is used.
// Work is split among OpenMP's threads by rows or by documents. Every sum has a fixed order, so the same number of threads
// gives the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

namespace {

// -- vectors -----------------------------------------------------------------------------------------------------------

constexpr int64_t W = 16;  // lanes

using Floats = float __attribute__((vector_size(4 * W)));
using Ints = int32_t __attribute__((vector_size(4 * W)));
using Words = uint32_t __attribute__((vector_size(4 * W)));
using Halves = uint16_t __attribute__((vector_size(2 * W)));
struct bfloat16 {
  uint16_t bits;
};

inline Floats all(float x) { return Floats{} + x; }

template <class To, class From>
inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}

inline Halves narrow(Floats x) {  // to the nearest, ties to even; a NaN stays one
#if defined(__AVX512BF16__)
  return bits_of<Halves>(_mm512_cvtneps_pbh((__m512)x));
#endif
  Words u = bits_of<Words>(x);
  Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, Halves);
}

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Floats load(const bfloat16* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return bits_of<Floats>(__builtin_convertvector(x, Words) << 16);
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline void store(bfloat16* p, Floats x) {
  Halves half = narrow(x);
  std::memcpy(p, &half, sizeof half);
}

// The last, incomplete vector of a row: `count` numbers, the other lanes `fill`.
template <class T>
inline Floats load_part(const T* p, int64_t count, float fill) {
  T padded[W] = {};
  std::memcpy(padded, p, count * sizeof(T));
  Floats x = load(padded);
  for (int64_t i = count; i < W; i++) x[i] = fill;
  return x;
}
template <class T>
inline void store_part(T* p, int64_t count, Floats x) {
  T padded[W];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

// Calls f(i, get, put) for each vector of a row, where get(p) reads p[i ...] and put(p, x) writes there.
template <class F>
inline void each(int64_t size, F f) {
  int64_t i = 0;
  for (; i + W <= size; i += W)
    f(i, [i](auto* p, float = 0) { return load(p + i); }, [i](auto* p, Floats x) { store(p + i, x); });
  if (int64_t count = size - i)
    f(i, [=](auto* p, float fill = 0) { return load_part(p + i, count, fill); },
      [=](auto* p, Floats x) { store_part(p + i, count, x); });
}

// Over the lanes, halving.
template <class F>
inline float fold(Floats x, F both) {
  float lane[W];
  store(lane, x);
  for (int64_t half = W / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) lane[i] = both(lane[i], lane[i + half]);
  return lane[0];
}
inline float sum(Floats x) {
  return fold(x, [](float a, float b) { return a + b; });
}
inline float largest(Floats x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}

// e^x for x <= 88, to about one unit in the last place: 2^n e^r with |r| <= ln(2) / 2; 0 below -87. NaN stays.
inline Floats exponential(Floats x) {
  Floats clamped = x < -87.0f ? all(-87.0f) : x;
  Floats shifted = clamped * 1.44269504f + 12582912.0f;  // the nearest integer stands in the low bits
  Floats n = shifted - 12582912.0f;
  Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Floats power = bits_of<Floats>((bits_of<Ints>(shifted) << 23) + bits_of<Ints>(y));
  power = x < -87.0f ? all(0.0f) : power;
  return x == x ? power : x;
}
inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(x < -88.0f ? all(88.0f) : -x)); }

// -- RMSNorm -----------------------------------------------------------------------------------------------------------

template <class T>
void norm_forward(const float* x, const float* weight, T* out, float* scale, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const float* in = x + row * size;
    T* to = out + row * size;
    Floats squares = {};
    each(size, [&](int64_t, auto get, auto) {
      Floats v = get(in);
      squares += v * v;
    });
    float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
    scale[row] = factor;
    each(size, [&](int64_t, auto get, auto put) { put(to, get(in) * factor * get(weight)); });
  }
}

// With n = x * s: grad_x = s (g w - n mean(g w n)), grad_weight = sum over rows of g n. One row of `partial` per thread.
template <class T>
void norm_backward(const T* grad, const float* x, const float* weight, const float* scale, float* grad_x, float* partial,
                   int64_t rows, int64_t size) {
#pragma omp parallel
  {
    float* own = partial + omp_get_thread_num() * size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const float* in = x + row * size;
      const T* up = grad + row * size;
      float* to = grad_x + row * size;
      float s = scale[row];
      Floats dots = {};
      each(size, [&](int64_t, auto get, auto put) {
        Floats g = get(up), n = get(in) * s;
        put(own, get(own) + g * n);
        dots += g * get(weight) * n;
      });
      float mean = sum(dots) / size;
      each(size, [&](int64_t, auto get, auto put) { put(to, s * (get(up) * get(weight) - get(in) * s * mean)); });
    }
  }
}

// -- SwiGLU ------------------------------------------------------------------------------------------------------------

// A row of `gate_up` holds the gates, then the ups.
template <class T>
void swiglu_forward(const T* gate_up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const T *gates = gate_up + 2 * row * size, *ups = gates + size;
    T* to = out + row * size;
    each(size, [&](int64_t, auto get, auto put) {
      Floats gate = get(gates);
      put(to, gate * sigmoid(gate) * get(ups));
    });
  }
}

template <class T>
void swiglu_backward(const T* grad, const T* gate_up, T* grad_gate_up, int64_t rows, int64_t size) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const T *gates = gate_up + 2 * row * size, *ups = gates + size, *from = grad + row * size;
    T *to_gates = grad_gate_up + 2 * row * size, *to_ups = to_gates + size;
    each(size, [&](int64_t, auto get, auto put) {
      Floats gate = get(gates), up = get(ups), g = get(from), s = sigmoid(gate);
      put(to_gates, g * up * s * (1.0f + gate * (1.0f - s)));
      put(to_ups, g * gate * s);
    });
  }
}

// -- cross-entropy -----------------------------------------------------------------------------------------------------

// losses[row] = weight * -log softmax(logits)[label]; hits[row] = weight where the label is the (first) largest. Where
// `has_grad`, the row of logits becomes its gradient: weight * (softmax - onehot).
template <class T>
void cross_entropy(T* logits, const int64_t* labels, const float* weights, float* losses, float* hits, int64_t rows,
                   int64_t size, bool has_grad) {
#pragma omp parallel
  {
    std::vector<float> exponentials(size);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      T* own = logits + row * size;
      float* e = exponentials.data();
      int64_t label = labels[row];
      float weight = weights[row];
      Floats highest = all(-INFINITY), total = {};
      each(size, [&](int64_t, auto get, auto) {
        Floats v = get(own, -INFINITY);
        highest = v > highest ? v : highest;
      });
      float best = largest(highest), at_label = load_part(own + label, 1, 0)[0];
      each(size, [&](int64_t, auto get, auto put) {
        Floats v = exponential(get(own, -INFINITY) - best);
        total += v;
        put(e, v);
      });
      float normaliser = sum(total);
      losses[row] = weight * (std::log(normaliser) + best - at_label);
      bool is_hit = at_label == best;
      for (int64_t i = 0; is_hit && i < label; i++) is_hit = load_part(own + i, 1, 0)[0] != best;
      hits[row] = is_hit ? weight : 0;
      if (!has_grad) continue;
      float factor = weight / normaliser;
      float label_grad = factor * e[label] - weight;
      each(size, [&](int64_t, auto get, auto put) { put(own, get(e) * factor); });
      store_part(own + label, 1, all(label_grad));
    }
  }
}

// -- small matrix products, for attention --------------------------------------------------------------------------------

// Operands lie in units of 32 bits along the summed axis: 1 float32, or 2 bfloat16. The left one is rows of units; the right
// one is panels of 16 columns, [units][16], so that it is read in one stream.
template <class T>
constexpr int64_t PER_UNIT = 4 / sizeof(T);

inline Floats add_dot(Floats sum, uint32_t left, Words right, float) {
  return sum + bits_of<float>(left) * bits_of<Floats>(right);
}
inline Floats add_dot(Floats sum, uint32_t left, Words right, bfloat16) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, bits_of<__m512bh>(right), bits_of<__m512bh>(Words{} + left));
#else
  sum += bits_of<float>(left << 16) * bits_of<Floats>(right << 16);
  return sum + bits_of<float>(left & 0xffff0000u) * bits_of<Floats>(right & 0xffff0000u);
#endif
}

constexpr int64_t ROWS = 8;    // of one tile: with two panels, 16 sums stay in registers
constexpr int64_t BLOCK = 32;  // queries whose scores exist at one time: keys are read once for all of them
constexpr int64_t MOST = 256;  // the largest head; kernels.py knows it too

// Calls f(0) ... f(N - 1), written out: what a loop counts stays a constant, so that small arrays live in registers.
template <class F, int64_t... I>
inline void in_turn(F f, std::integer_sequence<int64_t, I...>) {
  (f(std::integral_constant<int64_t, I>{}), ...);
}
template <int64_t N, class F>
inline void times(F f) {
  in_turn(f, std::make_integer_sequence<int64_t, N>{});
}

template <class T, int64_t PANELS>
inline void tile(const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t panel, float* out,
                 int64_t out_stride, int64_t units, bool is_added) {
  Floats sums[ROWS * PANELS];
  times<ROWS * PANELS>([&](auto i) {
    sums[i] = is_added ? load(out + i / PANELS * out_stride + i % PANELS * W) : Floats{};
  });
  for (int64_t u = 0; u < units; u++) {
    Words columns[PANELS];
    times<PANELS>([&](auto p) { std::memcpy(&columns[p], right + p * panel + u * W, sizeof(Words)); });
    times<ROWS * PANELS>([&](auto i) {
      sums[i] = add_dot(sums[i], left[i / PANELS * left_stride + u], columns[i % PANELS], T{});
    });
  }
  times<ROWS * PANELS>([&](auto i) { store(out + i / PANELS * out_stride + i % PANELS * W, sums[i]); });
}

// out (rows, 16 * panels) = or += left (rows, units) times right; rows are a multiple of 8, `panel` words apart.
template <class T>
void product(const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t panel, float* out,
             int64_t out_stride, int64_t rows, int64_t panels, int64_t units, bool is_added) {
  int64_t p = 0;
  for (; p + 2 <= panels; p += 2)
    for (int64_t r = 0; r < rows; r += ROWS)
      tile<T, 2>(left + r * left_stride, left_stride, right + p * panel, panel, out + r * out_stride + p * W, out_stride,
                 units, is_added);
  if (p < panels)
    for (int64_t r = 0; r < rows; r += ROWS)
      tile<T, 1>(left + r * left_stride, left_stride, right + p * panel, panel, out + r * out_stride + p * W, out_stride,
                 units, is_added);
}

// Four ways of writing float32 rows as operands: `rows` of the first axis, `size` (a multiple of 16) of the second.

// Units along the second axis, as they lie: a left operand.
template <class T>
void as_rows(const float* from, int64_t stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < size; i += W) store((T*)(to + r * to_stride) + i, load(from + r * stride + i));
}

// Units along the first axis, 16 lanes of the second: a right operand. The rows are even in number.
template <class T>
void as_panels(const float* from, int64_t stride, uint32_t* to, int64_t panel, int64_t rows, int64_t size) {
  for (int64_t r = 0; r < rows; r += PER_UNIT<T>)
    for (int64_t i = 0; i < size; i += W) {
      Words units;
      Floats first = load(from + r * stride + i);
      if constexpr (PER_UNIT<T> == 1) {
        units = bits_of<Words>(first);
      } else {
        Floats second = load(from + (r + 1) * stride + i);
        units = __builtin_convertvector(narrow(first), Words) | __builtin_convertvector(narrow(second), Words) << 16;
      }
      std::memcpy(to + i / W * panel + r / PER_UNIT<T> * W, &units, sizeof units);
    }
}

inline void transpose(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) to[c * to_stride + r] = from[r * stride + c];
}

// Units along the second axis, 16 lanes of the first (a multiple of 16): a right operand, turned.
template <class T>
void as_turned_panels(const float* from, uint32_t* to, int64_t rows, int64_t size) {
  const int64_t units = size / PER_UNIT<T>;
  uint32_t lines[W * MOST];
  for (int64_t r = 0; r < rows; r += W) {
    as_rows<T>(from + r * size, size, lines, units, W, size);
    transpose(lines, units, to + r * units, W, W, units);
  }
}

// Units along the first axis (even), rows of the second: a left operand, turned.
template <class T>
void as_turned_rows(const float* from, uint32_t* to, int64_t to_stride, int64_t rows, int64_t size) {
  const int64_t units = rows / PER_UNIT<T>;
  uint32_t panels[BLOCK * MOST];
  as_panels<T>(from, size, panels, units * W, rows, size);
  for (int64_t i = 0; i < size; i += W) transpose(panels + i * units, W, to + i * to_stride, to_stride, units, W);
}

// -- attention ---------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t heads, kv_heads, size, angle_rows;  // size of a head: a multiple of 16
  const float *q_norm, *k_norm;               // weights of RMSNorm on each query and key head before the rotation, or null
  float eps;
  int64_t width() const { return (heads + 2 * kv_heads) * size; }
};

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that a thread keeps between calls; `take` hands out the next piece, on a cache line's boundary.
struct Scratch {
  std::vector<Words> lines;
  int64_t used = 0;
  void begin(int64_t words) {
    if (int64_t(lines.size()) * W < words) lines.resize(words / W);
    used = 0;
  }
  template <class N>
  N* take(int64_t words) {
    N* piece = (N*)((uint32_t*)lines.data() + used);
    used += up_to(words, W) + W;  // one line more: pieces as large as a way of the cache must not share its sets
    return piece;
  }
};
thread_local Scratch scratch;

// The pair (i, i + size / 2) of a head turned by the angle of its token; `sign` -1 turns back, which is the gradient.
template <class From, class To>
void rotate(const From* from, const float* cos, const float* sin, int64_t token, float sign, To* to, const Shape& shape) {
  int64_t half = shape.size / 2, row = token % shape.angle_rows * half;
  each(half, [&](int64_t, auto get, auto put) {
    Floats first = get(from), second = get(from + half), c = get(cos + row), s = get(sin + row) * sign;
    put(to, first * c - second * s);
    put(to + half, second * c + first * s);
  });
}

// `count` rows of head `head` from token `first` on, in float32; zeros up to `padded` rows.
template <class T>
void read_head(const T* from, int64_t stride, int64_t head, int64_t first, int64_t count, int64_t padded, float* to,
               const Shape& shape) {
  for (int64_t r = 0; r < count; r++) {
    const T* row = from + (first + r) * stride + head * shape.size;
    for (int64_t i = 0; i < shape.size; i += W) store(to + r * shape.size + i, load(row + i));
  }
  std::fill(to + count * shape.size, to + padded * shape.size, 0.0f);
}

float norm_scale(const float* x, const Shape& shape) {
  Floats squares = {};
  for (int64_t i = 0; i < shape.size; i += W) squares += load(x + i) * load(x + i);
  return 1 / std::sqrt(sum(squares) / shape.size + shape.eps);
}

// Queries or keys: normalised, if `norm` has weights, then rotated.
template <class T>
void read_turned_head(const T* from, int64_t head, int64_t first, int64_t count, int64_t padded, const float* cos,
                      const float* sin, const float* norm, float* to, const Shape& shape) {
  read_head(from, shape.width(), head, first, count, padded, to, shape);
  for (int64_t r = 0; r < count; r++, to += shape.size) {
    const float scale = norm ? norm_scale(to, shape) : 1;
    for (int64_t i = 0; norm && i < shape.size; i += W) store(to + i, load(to + i) * scale * load(norm + i));
    rotate(to, cos, sin, first + r, 1, to, shape);
  }
}

// The way back of one row: `turned` is the gradient of what `read_turned_head` gave, `x` what it read. Writes the gradient
// of `x` and adds that of the norm's weights.
template <class T>
void write_turned_grad(const float* turned, const T* x, int64_t token, const float* cos, const float* sin,
                       const float* norm, float* grad_norm, T* to, const Shape& shape) {
  float grad[MOST], row[MOST];
  rotate(turned, cos, sin, token, -1, grad, shape);
  if (norm) {
    for (int64_t i = 0; i < shape.size; i += W) store(row + i, load(x + i));
    const float scale = norm_scale(row, shape);
    Floats dots = {};
    for (int64_t i = 0; i < shape.size; i += W) {
      Floats g = load(grad + i), n = load(row + i) * scale;
      store(grad_norm + i, load(grad_norm + i) + g * n);
      dots += g * load(norm + i) * n;
    }
    const float mean = sum(dots) / shape.size;
    for (int64_t i = 0; i < shape.size; i += W)
      store(grad + i, scale * (load(grad + i) * load(norm + i) - load(row + i) * scale * mean));
  }
  for (int64_t i = 0; i < shape.size; i += W) store(to + i, load(grad + i));
}

// Scores -> e^(scale (score - largest)) of the first `valid`, zeros up to `width`; returns their sum.
float exponentials(float* row, int64_t valid, int64_t width, float scale) {
  std::fill(row + valid, row + width, -INFINITY);
  Floats highest = all(-INFINITY), total = {};
  for (int64_t i = 0; i < width; i += W) {
    Floats v = load(row + i);
    highest = v > highest ? v : highest;
  }
  float best = largest(highest);
  for (int64_t i = 0; i < width; i += W) {
    Floats v = exponential((load(row + i) - best) * scale);
    total += v;
    store(row + i, v);
  }
  return sum(total);
}

int64_t longest_of(const int64_t* spans, int64_t documents) {
  int64_t longest = 0;
  for (int64_t d = 0; d < documents; d++) longest = std::max(longest, spans[d + 1] - spans[d]);
  return up_to(longest, W);
}

// Queries at one time: in a short document few, so that little is computed that is masked.
int64_t block_of(int64_t length) { return length <= 2 * BLOCK ? ROWS : BLOCK; }

// A row of `qkv` holds the query heads, the key heads, the value heads of a token. Document d is tokens spans[d] up to
// spans[d + 1]; each query sees the keys of its document up to its own.
template <class T>
void attention_forward(const T* qkv, const float* cos, const float* sin, const int64_t* spans, T* out, int64_t documents,
                       Shape shape) {
  const int64_t size = shape.size, group = shape.heads / shape.kv_heads, units = size / PER_UNIT<T>;
  const int64_t longest = longest_of(spans, documents);
  const float scale = 1 / std::sqrt(float(size));
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < documents * shape.kv_heads; item++) {
    scratch.begin(longest * (3 * size + 2 * BLOCK) + 3 * BLOCK * size + 16 * W);
    float* rows = scratch.take<float>(longest * size);
    uint32_t* keys = scratch.take<uint32_t>(longest * units);
    uint32_t* values = scratch.take<uint32_t>(longest * units);
    float* scores = scratch.take<float>(BLOCK * longest);
    uint32_t* probabilities = scratch.take<uint32_t>(BLOCK * longest / PER_UNIT<T>);
    float* queries = scratch.take<float>(BLOCK * size);
    uint32_t* left = scratch.take<uint32_t>(BLOCK * units);
    float* result = scratch.take<float>(BLOCK * size);

    const int64_t head = item % shape.kv_heads, begin = spans[item / shape.kv_heads];
    const int64_t length = spans[item / shape.kv_heads + 1] - begin, padded = up_to(length, W);
    const int64_t along = padded / PER_UNIT<T>;  // units along the keys
    read_turned_head(qkv, shape.heads + head, begin, length, padded, cos, sin, shape.k_norm, rows, shape);
    as_turned_panels<T>(rows, keys, padded, size);
    read_head(qkv, shape.width(), shape.heads + shape.kv_heads + head, begin, length, padded, rows, shape);
    as_panels<T>(rows, size, values, along * W, padded, size);
    const int64_t step = block_of(length);
    for (int64_t h = head * group; h < (head + 1) * group; h++)
      for (int64_t first = 0; first < length; first += step) {
        const int64_t count = std::min(step, length - first), here = up_to(count, ROWS), width = up_to(first + count, W);
        read_turned_head(qkv, h, begin + first, count, here, cos, sin, shape.q_norm, queries, shape);
        as_rows<T>(queries, size, left, units, here, size);
        product<T>(left, units, keys, units * W, scores, width, here, width / W, units, false);
        float sums[BLOCK];
        for (int64_t r = 0; r < here; r++)
          sums[r] = exponentials(scores + r * width, std::min(first + r + 1, length), width, scale);
        as_rows<T>(scores, width, probabilities, along, here, width);
        product<T>(probabilities, along, values, along * W, result, size, here, size / W, width / PER_UNIT<T>, false);
        for (int64_t r = 0; r < count; r++) {
          T* to = out + (begin + first + r) * shape.heads * size + h * size;
          for (int64_t i = 0; i < size; i += W) store(to + i, load(result + r * size + i) / sums[r]);
        }
      }
  }
}

// With P the probabilities and U the upstream gradient of a head: dV = P^T U; dP = U V^T; dS = scale P (dP - rowsum(P dP));
// dQ = dS K; dK = dS^T Q. P is computed anew, a block of queries at a time; dK and dV are summed turned, (size, keys).
// `norm_partial` has a row for each document and key head: the gradients of q_norm, then of k_norm. Not one for each thread:
// which takes which document is not the same twice.
template <class T>
void attention_backward(const T* upstream, const T* qkv, const float* cos, const float* sin, const int64_t* spans, T* grad,
                        float* norm_partial, int64_t documents, Shape shape) {
  const int64_t size = shape.size, group = shape.heads / shape.kv_heads, units = size / PER_UNIT<T>;
  const int64_t across = BLOCK / PER_UNIT<T>;  // units along a block's queries
  const int64_t longest = longest_of(spans, documents);
  const float scale = 1 / std::sqrt(float(size));
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < documents * shape.kv_heads; item++) {
    scratch.begin(longest * (6 * size + 5 * BLOCK) + 7 * BLOCK * size + 40 * W);
    float* key_rows = scratch.take<float>(longest * size);
    uint32_t* turned_keys = scratch.take<uint32_t>(longest * units);
    uint32_t* turned_values = scratch.take<uint32_t>(longest * units);
    uint32_t* keys = scratch.take<uint32_t>(longest * units);
    float* grad_k = scratch.take<float>(longest * size);
    float* grad_v = scratch.take<float>(longest * size);
    float* p = scratch.take<float>(BLOCK * longest);
    float* s = scratch.take<float>(BLOCK * longest);
    uint32_t* s_rows = scratch.take<uint32_t>(BLOCK * longest / PER_UNIT<T>);
    uint32_t* p_panels = scratch.take<uint32_t>(BLOCK * longest / PER_UNIT<T>);
    uint32_t* s_panels = scratch.take<uint32_t>(BLOCK * longest / PER_UNIT<T>);
    float* queries = scratch.take<float>(BLOCK * size);
    float* ups = scratch.take<float>(BLOCK * size);
    uint32_t* query_rows = scratch.take<uint32_t>(BLOCK * units);
    uint32_t* up_rows = scratch.take<uint32_t>(BLOCK * units);
    uint32_t* turned_queries = scratch.take<uint32_t>(BLOCK * units);
    uint32_t* turned_ups = scratch.take<uint32_t>(BLOCK * units);
    float* grad_q = scratch.take<float>(BLOCK * size);

    const int64_t head = item % shape.kv_heads, begin = spans[item / shape.kv_heads];
    const int64_t length = spans[item / shape.kv_heads + 1] - begin, padded = up_to(length, W);
    float* grad_q_norm = norm_partial + item * 2 * size;
    float* grad_k_norm = grad_q_norm + size;
    const int64_t along = padded / PER_UNIT<T>, key_head = shape.heads + head, value_head = key_head + shape.kv_heads;
    read_turned_head(qkv, key_head, begin, length, padded, cos, sin, shape.k_norm, key_rows, shape);
    as_turned_panels<T>(key_rows, turned_keys, padded, size);
    as_panels<T>(key_rows, size, keys, along * W, padded, size);
    float* value_rows = key_rows;
    read_head(qkv, shape.width(), value_head, begin, length, padded, value_rows, shape);
    as_turned_panels<T>(value_rows, turned_values, padded, size);
    std::fill(grad_k, grad_k + padded * size, 0.0f);
    std::fill(grad_v, grad_v + padded * size, 0.0f);
    for (int64_t h = head * group; h < (head + 1) * group; h++)
      for (int64_t block = 0; block < length; block += BLOCK) {
        const int64_t in_block = std::min(BLOCK, length - block), rows = up_to(in_block, ROWS);
        const int64_t width = up_to(block + in_block, W);
        read_turned_head(qkv, h, begin + block, in_block, rows, cos, sin, shape.q_norm, queries, shape);
        read_head(upstream, shape.heads * size, h, begin + block, in_block, rows, ups, shape);
        as_rows<T>(queries, size, query_rows, units, rows, size);
        as_rows<T>(ups, size, up_rows, units, rows, size);
        as_turned_rows<T>(queries, turned_queries, across, rows, size);
        as_turned_rows<T>(ups, turned_ups, across, rows, size);
        const int64_t step = std::min(block_of(length), rows);
        for (int64_t r0 = 0; r0 < rows; r0 += step) {
          const int64_t here = std::min(step, rows - r0), seen = up_to(std::min(block + r0 + here, length), W);
          product<T>(query_rows + r0 * units, units, turned_keys, units * W, p, width, here, seen / W, units, false);
          product<T>(up_rows + r0 * units, units, turned_values, units * W, s, width, here, seen / W, units, false);
          for (int64_t r = 0; r < here; r++) {
            float *own_p = p + r * width, *own_s = s + r * width;
            std::fill(own_p + seen, own_p + width, 0.0f);
            std::fill(own_s + seen, own_s + width, 0.0f);
            const bool is_real = block + r0 + r < length;
            const float total = exponentials(own_p, std::min(block + r0 + r + 1, length), seen, scale);
            const float factor = is_real ? 1 / total : 0;
            Floats dots = {};
            for (int64_t i = 0; i < seen; i += W) {
              Floats v = load(own_p + i) * factor;
              dots += v * load(own_s + i);
              store(own_p + i, v);
            }
            const float mean = sum(dots);
            for (int64_t i = 0; i < seen; i += W) store(own_s + i, load(own_p + i) * (load(own_s + i) - mean) * scale);
          }
          as_rows<T>(s, width, s_rows, along, here, seen);
          as_panels<T>(p, width, p_panels + r0 / PER_UNIT<T> * W, across * W, here, width);
          as_panels<T>(s, width, s_panels + r0 / PER_UNIT<T> * W, across * W, here, width);
          product<T>(s_rows, along, keys, along * W, grad_q, size, here, size / W, seen / PER_UNIT<T>, false);
          for (int64_t r = 0; r < here && block + r0 + r < length; r++) {
            const int64_t token = begin + block + r0 + r;
            const int64_t at = token * shape.width() + h * size;
            write_turned_grad(grad_q + r * size, qkv + at, token, cos, sin, shape.q_norm, grad_q_norm, grad + at, shape);
          }
        }
        product<T>(turned_ups, across, p_panels, across * W, grad_v, padded, size, width / W, rows / PER_UNIT<T>, true);
        product<T>(turned_queries, across, s_panels, across * W, grad_k, padded, size, width / W, rows / PER_UNIT<T>, true);
      }
    for (int64_t t = 0; t < length; t++) {
      float *row_k = queries, *row_v = ups;  // free by now
      for (int64_t i = 0; i < size; i++) row_k[i] = grad_k[i * padded + t], row_v[i] = grad_v[i * padded + t];
      T* to = grad + (begin + t) * shape.width();
      const T* x = qkv + (begin + t) * shape.width() + key_head * size;
      write_turned_grad(row_k, x, begin + t, cos, sin, shape.k_norm, grad_k_norm, to + key_head * size, shape);
      for (int64_t i = 0; i < size; i += W) store(to + value_head * size + i, load(row_v + i));
    }
  }
}

}  // namespace

// -- what kernels.py calls: once for each type ---------------------------------------------------------------------------

#define FOR_TYPE(T)                                                                                                        \
  void norm_forward_##T(const float* x, const float* weight, T* out, float* scale, int64_t rows, int64_t size, float eps) {  \
    norm_forward(x, weight, out, scale, rows, size, eps);                                                                  \
  }                                                                                                                        \
  void norm_backward_##T(const T* grad, const float* x, const float* weight, const float* scale, float* grad_x,            \
                         float* partial, int64_t rows, int64_t size) {                                                     \
    norm_backward(grad, x, weight, scale, grad_x, partial, rows, size);                                                    \
  }                                                                                                                        \
  void swiglu_forward_##T(const T* gate_up, T* out, int64_t rows, int64_t size) {                                          \
    swiglu_forward(gate_up, out, rows, size);                                                                              \
  }                                                                                                                        \
  void swiglu_backward_##T(const T* grad, const T* gate_up, T* grad_gate_up, int64_t rows, int64_t size) {                 \
    swiglu_backward(grad, gate_up, grad_gate_up, rows, size);                                                              \
  }                                                                                                                        \
  void cross_entropy_##T(T* logits, const int64_t* labels, const float* weights, float* losses, float* hits, int64_t rows, \
                         int64_t size, int64_t has_grad) {                                                                 \
    cross_entropy(logits, labels, weights, losses, hits, rows, size, has_grad != 0);                                       \
  }                                                                                                                        \
  void attention_forward_##T(const T* qkv, const float* cos, const float* sin, const int64_t* spans, const float* q_norm,  \
                             const float* k_norm, T* out, int64_t documents, int64_t heads, int64_t kv_heads,              \
                             int64_t size, int64_t angle_rows, float eps) {                                                \
    attention_forward(qkv, cos, sin, spans, out, documents, Shape{heads, kv_heads, size, angle_rows, q_norm, k_norm, eps}); \
  }                                                                                                                        \
  void attention_backward_##T(const T* qkv, const float* cos, const float* sin, const int64_t* spans, const float* q_norm, \
                              const float* k_norm, const T* upstream, T* grad, float* norm_partial, int64_t documents,     \
                              int64_t heads, int64_t kv_heads, int64_t size, int64_t angle_rows, float eps) {              \
    attention_backward(upstream, qkv, cos, sin, spans, grad, norm_partial, documents,                                      \
                       Shape{heads, kv_heads, size, angle_rows, q_norm, k_norm, eps});                                     \
  }

extern "C" {
using float32 = float;
FOR_TYPE(float32)
FOR_TYPE(bfloat16)
int64_t num_threads() { return omp_get_max_threads(); }
}
