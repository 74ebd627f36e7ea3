// One decode step of a dense model (Llama, or Qwen3 with QK-norm) on a CPU: one token of each row in, its logits out.
//
// Best read from the bottom up: `Step::walk` is the whole model, line by line; above it stand attention, the one matrix
// product, the threads and the vectors. `native.py` builds this file, packs the weights and calls it. The model in
// PyTorch is its definition, and `tests/inference/test_native.py` holds the two together.
//
// Decoding reads every weight once per step and computes little with it, so memory sets the pace. Three things follow:
//   * Weights lie in panels, in the order in which they are read: one stream, no jumps. A panel is WIDTH outputs,
//     [units of inputs][WIDTH], where a unit is 32 bits: 1 float32, 2 bfloat16 or 4 int8 inputs. It is read once for
//     all rows, and meets up to ROWS of them at a time in registers.
//   * Every width is rounded up to whole panels. Padding is zero, so it changes no sum, and no loop needs a remainder.
//   * All threads walk through the step together, each with its share of the panels; `team.meet()` stands where one
//     needs what the others wrote. What costs next to nothing (norms) each computes for itself.
//
// A sum runs over its inputs in one fixed order, however many rows and threads there are: the logits of a row are the
// same bits alone and in any company.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

// -- what native.py hands over; its structures mirror these, field by field -------------------------------------------

extern "C" {

struct Matrix {
  const uint32_t* panels;
  int64_t outputs, units;  // rounded up to whole panels; units per output
};

struct Layer {
  const float *attention_norm, *feed_forward_norm, *q_norm, *k_norm;  // the last two: null without QK-norm
  Matrix qkv, o, gate, up, down;
};

struct Model {
  const Layer* layers;
  const float *embedding, *norm;  // (vocabulary, hidden), (hidden)
  Matrix head;
  const float *cos, *sin;  // (positions, head_dim / 2)
  void *keys, *values;     // (layers, max_rows, kv_heads, slots, head_dim)
  int64_t num_layers, hidden, heads, kv_heads, head_dim, max_rows, slots;
  int64_t inputs_per_unit;     // of the weights: 1 float32, 2 bfloat16, 4 int8
  int64_t has_bfloat16_cache;  // else float32
  float eps;
};
}

namespace {

// -- vectors as wide as the machine's, in the notation of GCC and Clang -----------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;  // half as many registers
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int WIDTH = 2 * LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Units __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits, read as another type");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat {  // the upper half of a float32
  uint16_t upper;
};

BFloat rounded(float x) {  // to nearest, ties to even
  const uint32_t u = bits<uint32_t>(x);
  return {uint16_t(x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fc0)};
}

template <class Vector>
Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// The next LANES numbers of a head; zeros after the last one.
Floats load(const float* from, int64_t count) {
  if (count >= LANES) return load<Floats>(from);
  Floats v = {};
  std::memcpy(&v, from, 4 * count);
  return v;
}

Floats load(const BFloat* from, int64_t count) {
  Halves v = {};
  if (count >= LANES)
    v = load<Halves>(from);
  else
    std::memcpy(&v, from, 2 * count);
  return bits<Floats>(__builtin_convertvector(v, Units) << 16);
}

void store(float* to, Floats v, int64_t count = LANES) { std::memcpy(to, &v, 4 * std::min<int64_t>(count, LANES)); }
void store(float* to, float x) { *to = x; }
void store(BFloat* to, float x) { *to = rounded(x); }

float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bits<__m512>(v));
#else
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

constexpr float TO_WHOLE = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held by the lowest bits

// e^x to 1e-7 of itself, x held inside [-87, 88]: 2^n through the exponent's bits, times a Taylor polynomial in the
// rest, which is at most ln(2) / 2.
Floats exponential(Floats x) {
  const Floats lowest = Floats{} - 87.0f, highest = Floats{} + 88.0f;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Floats n = (x * 1.44269504f + TO_WHOLE) - TO_WHOLE;
  const Floats rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts: the first product is exact
  Floats power = Floats{} + 1.0f / 5040;
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
    power = power * rest + coefficient;
  return bits<Floats>(bits<Ints>(power) + (__builtin_convertvector(n, Ints) << 23));
}

// -- the formats of a weight ------------------------------------------------------------------------------------------

// How weights and inputs become units, how the two meet, and how a sum starts and ends. A panel and a row of inputs may
// begin with a HEADER, of so many units per output and per row.

struct Float32 {
  using Sum = Floats;
  static constexpr int64_t INPUTS = 1, HEADER = 0;  // inputs per unit
  static void pack_weights(const float* w, int64_t units, uint32_t* to) { std::memcpy(to, w, 4 * units); }
  static void pack_inputs(const float* x, int64_t units, uint32_t* to) { std::memcpy(to, x, 4 * units); }
  static Sum start(const uint32_t*) { return Sum{}; }
  static Sum add(Sum sum, Units w, uint32_t x) { return sum + bits<Floats>(w) * bits<float>(x); }
  static Floats end(Sum sum, const uint32_t*, const uint32_t*) { return sum; }
};

struct BFloat16 {
  using Sum = Floats;
  static constexpr int64_t INPUTS = 2, HEADER = 0;
  static void pack_weights(const float* w, int64_t units, uint32_t* to) { pack_inputs(w, units, to); }
  static void pack_inputs(const float* x, int64_t units, uint32_t* to) {
    for (int64_t i = 0; i < units; i++) to[i] = rounded(x[2 * i]).upper | uint32_t(rounded(x[2 * i + 1]).upper) << 16;
  }
  static Sum start(const uint32_t*) { return Sum{}; }
  static Sum add(Sum sum, Units w, uint32_t x) {
#if defined(__AVX512BF16__)
    return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(w), bits<__m512bh>(Units{} + x)));
#else
    sum += bits<Floats>(w << 16) * bits<float>(x << 16);
    return sum + bits<Floats>(w & 0xffff0000u) * bits<float>(x & 0xffff0000u);
#endif
  }
  static Floats end(Sum sum, const uint32_t*, const uint32_t*) { return sum; }
};

// Whole numbers from -127 to 127, times a scale of their own for each output and for each row of inputs. Processors
// multiply signed by unsigned bytes, so inputs are kept 128 too large, and sums start by what that will add too much.
struct Int8 {
  using Sum = Ints;
  static constexpr int64_t INPUTS = 4, HEADER = 2;  // scale, start

  static void pack_weights(const float* w, int64_t units, uint32_t* to) {
    auto* bytes = reinterpret_cast<int8_t*>(to + HEADER);
    const float scale = quantise(w, 4 * units, reinterpret_cast<uint8_t*>(bytes), 0);
    int32_t total = 0;
    for (int64_t i = 0; i < 4 * units; i++) total += bytes[i];
    to[0] = bits<uint32_t>(scale);
    to[1] = bits<uint32_t>(-128 * total);
  }

  static void pack_inputs(const float* x, int64_t units, uint32_t* to) {
    to[0] = bits<uint32_t>(quantise(x, 4 * units, reinterpret_cast<uint8_t*>(to + HEADER), 128));
  }

  static Sum start(const uint32_t* header) { return load<Ints>(header + WIDTH); }

  static Sum add(Sum sum, Units w, uint32_t x) {
#if defined(__AVX512VNNI__)
    return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sum), bits<__m512i>(Units{} + x), bits<__m512i>(w)));
#else
    for (int byte = 0; byte < 4; byte++)
      sum += (bits<Ints>(w << (24 - 8 * byte)) >> 24) * int32_t(x >> 8 * byte & 255);
    return sum;
#endif
  }

  static Floats end(Sum sum, const uint32_t* header, const uint32_t* x) {
    return __builtin_convertvector(sum, Floats) * (load<Floats>(header) * bits<float>(x[0]));
  }

  // Writes round(x / scale) + shift; returns the scale that makes the largest 127.
  static float quantise(const float* x, int64_t count, uint8_t* to, int shift) {
    float largest = 0;
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, std::fabs(x[i]));
    const float inverse = largest > 0 ? 127 / largest : 0;
    for (int64_t i = 0; i < count; i++) to[i] = uint8_t(bits<uint32_t>(x[i] * inverse + TO_WHOLE) + shift);
    return largest / 127;
  }
};

// -- threads ----------------------------------------------------------------------------------------------------------

// Threads that do the same work together: OpenMP's, which are PyTorch's too. After every operation those wait for the
// next one awake, for milliseconds, and would keep any other threads from the processors. Without OpenMP: one thread.
class Team {
 public:
  const int most;
  int size = 1;  // how many are at work

  explicit Team(int threads) : most(threads) {}

  // Call work(thread) in every thread, this one included; return when all are done.
  template <class Work>
  void together(Work work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(most)
    {
#pragma omp single
      size = omp_get_num_threads();
      work(omp_get_thread_num());
    }
#else
    work(0);
#endif
  }

  // Return when every thread has come here.
  void meet() {
    if (size == 1) return;
    const unsigned now = meetings_;
    if (++arrived_ == size) {
      arrived_ = 0;
      meetings_ = now + 1;
    }
    // Others may need this thread's processor, so it is offered to them after a few microseconds.
    for (int turns = 0; meetings_ == now; turns++) turns < 1000 ? relax() : std::this_thread::yield();
  }

 private:
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::atomic<unsigned> meetings_{0};
  std::atomic<int> arrived_{0};
};

// -- the matrix product -----------------------------------------------------------------------------------------------

enum Write { SET, ADD };

// A panel times `rows` rows: 2 * rows vectors of sums stay in registers while the panel streams past.
template <class Format, int rows>
void tile(const uint32_t* panel, int64_t units, const uint32_t* x, float* out, int64_t stride, Write write) {
  const int64_t x_stride = Format::HEADER + units;
  const uint32_t *weights = panel + Format::HEADER * WIDTH, *inputs = x + Format::HEADER;
  typename Format::Sum sums[rows][2];
  for (int row = 0; row < rows; row++)
    for (int half = 0; half < 2; half++) sums[row][half] = Format::start(panel + half * LANES);
  for (int64_t unit = 0; unit < units; unit++) {
    const Units left = load<Units>(weights + unit * WIDTH), right = load<Units>(weights + unit * WIDTH + LANES);
    for (int row = 0; row < rows; row++) {
      sums[row][0] = Format::add(sums[row][0], left, inputs[row * x_stride + unit]);
      sums[row][1] = Format::add(sums[row][1], right, inputs[row * x_stride + unit]);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int half = 0; half < 2; half++) {
      float* to = out + row * stride + half * LANES;
      const Floats result = Format::end(sums[row][half], panel + half * LANES, x + row * x_stride);
      store(to, write == ADD ? load<Floats>(to) + result : result);
    }
}

// The same for a number of rows that the compiler does not know: 1 to `most`.
template <class Format, int most>
void tile_of(int64_t rows, const uint32_t* panel, int64_t units, const uint32_t* x, float* out, int64_t stride,
             Write write) {
  if constexpr (most > 1)
    if (rows < most) return tile_of<Format, most - 1>(rows, panel, units, x, out, stride, write);
  tile<Format, most>(panel, units, x, out, stride, write);
}

// -- the step ---------------------------------------------------------------------------------------------------------

int64_t padded(int64_t width) { return (width + WIDTH - 1) / WIDTH * WIDTH; }

class Step {
 public:
  Step(const Model& model, int threads)
      : model_(model),
        hidden_width_(padded(model.hidden)),
        heads_width_(padded(model.heads * model.head_dim)),
        inner_width_(model.layers[0].gate.outputs),
        hidden_(model.max_rows * hidden_width_),
        qkv_(model.max_rows * model.layers[0].qkv.outputs),
        mixed_(model.max_rows * heads_width_),
        gate_(model.max_rows * inner_width_),
        up_(model.max_rows * inner_width_),
        desks_(threads),
        team_(threads) {
    for (Desk& desk : desks_) {
      desk.normed.resize(hidden_width_);
      desk.units.resize(model.max_rows * (2 + std::max({hidden_width_, heads_width_, inner_width_})));
      desk.scores.resize(HEADS * padded(model.slots));
    }
  }

  // Row i of the cache gets token i at position i (-1: the row is idle). logits: (rows, outputs of the head).
  void run(int64_t rows, const int64_t* tokens, const int64_t* positions, float* logits) {
    rows_ = rows, tokens_ = tokens, positions_ = positions, logits_ = logits;
    team_.together([this](int thread) { start(thread); });
  }

 private:
  struct Desk {  // what one thread works on alone
    std::vector<uint32_t> units;  // the inputs of the next product, row after row
    std::vector<float> normed, scores;
  };

  void start(int thread) {
    if (model_.inputs_per_unit == Float32::INPUTS) start<Float32>(thread);
    if (model_.inputs_per_unit == BFloat16::INPUTS) start<BFloat16>(thread);
    if (model_.inputs_per_unit == Int8::INPUTS) start<Int8>(thread);
  }

  template <class Format>
  void start(int thread) {
    model_.has_bfloat16_cache ? walk<Format, BFloat>(thread) : walk<Format, float>(thread);
  }

  // The model.
  template <class Format, class Number>
  void walk(int thread) {
    embed(thread);
    team_.meet();
    for (int64_t index = 0; index < model_.num_layers; index++) {
      const Layer& layer = model_.layers[index];
      take_normed<Format>(thread, layer.attention_norm);
      multiply<Format>(thread, layer.qkv, qkv_.data(), SET);
      team_.meet();
      attend<Number>(thread, index);
      team_.meet();
      take<Format>(thread, mixed_, heads_width_);
      multiply<Format>(thread, layer.o, hidden_.data(), ADD);
      team_.meet();
      take_normed<Format>(thread, layer.feed_forward_norm);
      multiply<Format>(thread, layer.gate, gate_.data(), SET);
      multiply<Format>(thread, layer.up, up_.data(), SET);
      activate(thread);
      team_.meet();
      take<Format>(thread, gate_, inner_width_);
      multiply<Format>(thread, layer.down, hidden_.data(), ADD);
      team_.meet();
    }
    take_normed<Format>(thread, model_.norm);
    multiply<Format>(thread, model_.head, logits_, SET);
  }

  struct Share {
    int64_t begin, end;
  };

  Share share_of(int64_t count, int thread) const {
    return {count * thread / team_.size, count * (thread + 1) / team_.size};
  }

  void embed(int thread) {
    const Share share = share_of(rows_, thread);
    for (int64_t row = share.begin; row < share.end; row++)
      std::memcpy(&hidden_[row * hidden_width_], model_.embedding + tokens_[row] * model_.hidden, 4 * model_.hidden);
  }

  // Put every row's inputs on the desk, in the weights' format.
  template <class Format>
  void take(int thread, const std::vector<float>& from, int64_t width) {
    const int64_t units = width / Format::INPUTS;
    for (int64_t row = 0; row < rows_; row++)
      Format::pack_inputs(&from[row * width], units, &desks_[thread].units[row * (Format::HEADER + units)]);
  }

  // The same, of hidden / sqrt(mean(hidden^2) + eps) * weight.
  template <class Format>
  void take_normed(int thread, const float* weight) {
    Desk& desk = desks_[thread];
    const int64_t units = hidden_width_ / Format::INPUTS;
    for (int64_t row = 0; row < rows_; row++) {
      normalise(&hidden_[row * hidden_width_], model_.hidden, weight, desk.normed.data());
      Format::pack_inputs(desk.normed.data(), units, &desk.units[row * (Format::HEADER + units)]);
    }
  }

  void normalise(const float* x, int64_t size, const float* weight, float* out) const {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i, size - i) * load(x + i, size - i);
    const float scale = 1.0f / std::sqrt(sum(squares) / size + model_.eps);
    for (int64_t i = 0; i < size; i++) out[i] = weight[i] * (x[i] * scale);
  }

  // out = (or +=) matrix times what lies on the desk: this thread's panels, for all rows.
  template <class Format>
  void multiply(int thread, const Matrix& matrix, float* out, Write write) {
    const Share share = share_of(matrix.outputs / WIDTH, thread);
    const uint32_t* x = desks_[thread].units.data();
    const int64_t stride = Format::HEADER + matrix.units;
    for (int64_t panel = share.begin; panel < share.end; panel++)
      for (int64_t row = 0; row < rows_; row += ROWS)
        tile_of<Format, ROWS>(rows_ - row, matrix.panels + panel * WIDTH * stride, matrix.units, x + row * stride,
                              out + row * matrix.outputs + panel * WIDTH, matrix.outputs, write);
  }

  // gate = silu(gate) * up, in the columns that this thread has just multiplied.
  void activate(int thread) {
    const Share share = share_of(inner_width_ / WIDTH, thread);
    for (int64_t row = 0; row < rows_; row++)
      for (int64_t i = share.begin * WIDTH; i < share.end * WIDTH; i += LANES) {
        float* gate = &gate_[row * inner_width_ + i];
        const Floats x = load<Floats>(gate);
        store(gate, x / (1.0f + exponential(-x)) * load<Floats>(&up_[row * inner_width_ + i]));
      }
  }

  template <class Number>
  void attend(int thread, int64_t layer) {
    const int64_t tasks = rows_ * model_.kv_heads;
    for (int64_t task = thread; task < tasks; task += team_.size)
      attend<Number>(desks_[thread], layer, task / model_.kv_heads, task % model_.kv_heads);
  }

  // One key/value head of one row, with the query heads that share it.
  template <class Number>
  void attend(Desk& desk, int64_t layer, int64_t row, int64_t kv_head) {
    const int64_t size = model_.head_dim, group = model_.heads / model_.kv_heads, position = positions_[row];
    if (position < 0) return;  // an idle row: whatever comes out of it, nobody reads
    float* mixed = &mixed_[row * heads_width_ + kv_head * group * size];

    float* qkv = &qkv_[row * model_.layers[layer].qkv.outputs];
    float* queries = qkv + kv_head * group * size;
    float* key = qkv + (model_.heads + kv_head) * size;
    const float* value = qkv + (model_.heads + model_.kv_heads + kv_head) * size;
    const int64_t place = ((layer * model_.max_rows + row) * model_.kv_heads + kv_head) * model_.slots * size;
    Number* keys = static_cast<Number*>(model_.keys) + place;
    Number* values = static_cast<Number*>(model_.values) + place;

    for (int64_t head = 0; head < group; head++)
      place_in_time(queries + head * size, model_.layers[layer].q_norm, position);
    place_in_time(key, model_.layers[layer].k_norm, position);
    for (int64_t i = 0; i < size; i++) store(keys + position * size + i, key[i]);
    for (int64_t i = 0; i < size; i++) store(values + position * size + i, value[i]);

    for (int64_t head = 0; head < group; head += HEADS)
      look_around_of<Number, HEADS>(group - head, queries + head * size, keys, values, position + 1, desk.scores.data(),
                                    mixed + head * size);
  }

  static constexpr int HEADS = 4;  // that meet a key or a value together, once it is loaded

  // softmax(q k^T / sqrt(size)) v for a few query heads over the same keys and values.
  template <class Number, int heads>
  void look_around(const float* queries, const Number* keys, const Number* values, int64_t length, float* scores,
                   float* out) {
    const int64_t size = model_.head_dim, stride = padded(model_.slots);
    const float scale = 1.0f / std::sqrt(float(size));
    for (int64_t slot = 0; slot < length; slot++) {
      Floats products[heads] = {};
      for (int64_t i = 0; i < size; i += LANES) {
        const Floats key = load(keys + slot * size + i, size - i);
        __builtin_prefetch(values + slot * size + i);  // comes from memory while the scores are computed
        for (int head = 0; head < heads; head++) products[head] += load(queries + head * size + i, size - i) * key;
      }
      for (int head = 0; head < heads; head++) scores[head * stride + slot] = sum(products[head]) * scale;
    }
    for (int head = 0; head < heads; head++) softmax(scores + head * stride, length);
    for (int64_t i = 0; i < size; i += LANES) {
      Floats totals[heads] = {};
      for (int64_t slot = 0; slot < length; slot++) {
        const Floats value = load(values + slot * size + i, size - i);
        for (int head = 0; head < heads; head++) totals[head] += scores[head * stride + slot] * value;
      }
      for (int head = 0; head < heads; head++) store(out + head * size + i, totals[head], size - i);
    }
  }

  template <class Number, int most>
  void look_around_of(int64_t heads, const float* queries, const Number* keys, const Number* values, int64_t length,
                      float* scores, float* out) {
    if constexpr (most > 1)
      if (heads < most) return look_around_of<Number, most - 1>(heads, queries, keys, values, length, scores, out);
    look_around<Number, most>(queries, keys, values, length, scores, out);
  }

  // QK-norm where the model has it, then the rotation of pair (i, i + size / 2) by the position's angle.
  void place_in_time(float* head, const float* norm, int64_t position) const {
    const int64_t half = model_.head_dim / 2;
    if (norm) normalise(head, model_.head_dim, norm, head);
    const float *cos = model_.cos + position * half, *sin = model_.sin + position * half;
    for (int64_t i = 0; i < half; i++) {
      const float first = head[i], second = head[i + half];
      head[i] = first * cos[i] - second * sin[i];
      head[i + half] = second * cos[i] + first * sin[i];
    }
  }

  static void softmax(float* scores, int64_t length) {
    std::fill(scores + length, scores + padded(length), -INFINITY);  // the rest of the last vector
    Floats highest = load<Floats>(scores), total = {};
    for (int64_t i = LANES; i < length; i += LANES) {
      const Floats next = load<Floats>(scores + i);
      highest = next > highest ? next : highest;
    }
    float lanes[LANES];
    store(lanes, highest);
    const float largest = *std::max_element(lanes, lanes + LANES);
    for (int64_t i = 0; i < length; i += LANES) {
      const Floats e = exponential(load<Floats>(scores + i) - largest);
      store(scores + i, e);
      total += e;
    }
    const float share = 1.0f / sum(total);
    for (int64_t i = 0; i < length; i++) scores[i] *= share;
  }

  const Model& model_;
  const int64_t hidden_width_, heads_width_, inner_width_;
  std::vector<float> hidden_, qkv_, mixed_, gate_, up_;  // (max_rows, width), shared by the threads
  std::vector<Desk> desks_;
  int64_t rows_ = 0;
  const int64_t *tokens_ = nullptr, *positions_ = nullptr;
  float* logits_ = nullptr;
  Team team_;
};

// -- the door ---------------------------------------------------------------------------------------------------------

template <class Format>
void pack(const float* weights, int64_t outputs, int64_t inputs, uint32_t* panels) {
  const int64_t units = padded(inputs) / Format::INPUTS, height = Format::HEADER + units;
  std::vector<float> row(padded(inputs));
  std::vector<uint32_t> panel(WIDTH * height);  // output after output
  for (int64_t first = 0; first < outputs; first += WIDTH, panels += WIDTH * height) {
    for (int64_t i = 0; i < WIDTH; i++) {
      if (first + i < outputs) std::memcpy(row.data(), weights + (first + i) * inputs, 4 * inputs);
      else std::fill(row.begin(), row.end(), 0.0f);
      Format::pack_weights(row.data(), units, &panel[i * height]);
    }
    for (int64_t begin = 0; begin < height; begin += LANES)  // a line of the cache at a time
      for (int64_t i = 0; i < WIDTH; i++)
        for (int64_t unit = begin; unit < std::min(begin + LANES, height); unit++)
          panels[unit * WIDTH + i] = panel[i * height + unit];
  }
}

}  // namespace

extern "C" {

int64_t panel_width() { return WIDTH; }

// (outputs, inputs) float32 weights into panels; both numbers are rounded up to whole panels.
void pack_float32(const float* weights, int64_t outputs, int64_t inputs, uint32_t* panels) {
  pack<Float32>(weights, outputs, inputs, panels);
}

void pack_bfloat16(const float* weights, int64_t outputs, int64_t inputs, uint32_t* panels) {
  pack<BFloat16>(weights, outputs, inputs, panels);
}

void pack_int8(const float* weights, int64_t outputs, int64_t inputs, uint32_t* panels) {
  pack<Int8>(weights, outputs, inputs, panels);
}

// A number that any change of these `bytes` (a multiple of 2) changes, but for one chance in 2^32 or so.
uint64_t digest(const uint16_t* data, int64_t bytes) {
  Units state[4] = {};
  const int64_t step = sizeof(state);
  uint64_t total = bytes;
  int64_t at = 0;
  for (; at + step <= bytes; at += step)
    for (int i = 0; i < 4; i++) {
      const Units next = load<Units>(data + at / 2 + i * 2 * LANES);
      state[i] = (state[i] ^ next) * 0x9e3779b1u + (state[i] >> 15);
    }
  for (; at < bytes; at += 2) total = (total ^ data[at / 2]) * 0x100000001b3u;
  for (const Units& units : state)
    for (int i = 0; i < LANES; i++) total = (total ^ units[i]) * 0x100000001b3u;
  return total;
}

// The model and all it points to must stay until `end`. Null when there is no memory to be had.
void* begin(const Model* model, int64_t threads) {
  try {
    return new Step(*model, int(threads));
  } catch (const std::exception&) {
    return nullptr;
  }
}

void step(void* handle, int64_t rows, const int64_t* tokens, const int64_t* positions, float* logits) {
  static_cast<Step*>(handle)->run(rows, tokens, positions, logits);
}

void end(void* handle) { delete static_cast<Step*>(handle); }
}
