// Operations on the images of one host, forward and backward. It follows kernels.hpp.
//
// Activations are [block][channel][pixel][image]: the vectors of a processor lie along the images,
// and a weight is one number for all of them. A block has IMAGES images. The last block of a batch
// is filled with copies of its last image, whose gradients are 0.

#include <utility>

enum { IMAGES = 2 * LANES };

INLINE int smallest(int a, int b) { return a < b ? a : b; }
INLINE int greatest(int a, int b) { return a > b ? a : b; }

// One pixel of the images of a block.
struct Pixel { Vector low, high; };
INLINE Pixel at(const float* x) { return {*(const Vector*)x, *(const Vector*)(x + LANES)}; }
INLINE void put(float* to, Pixel x) { *(Vector*)to = x.low; *(Vector*)(to + LANES) = x.high; }
INLINE Pixel operator+(Pixel x, Pixel y) { return {x.low + y.low, x.high + y.high}; }
INLINE Pixel operator-(Pixel x, Pixel y) { return {x.low - y.low, x.high - y.high}; }
INLINE Pixel operator*(Pixel x, Pixel y) { return {x.low * y.low, x.high * y.high}; }
INLINE Pixel operator+(Pixel x, float y) { return {x.low + y, x.high + y}; }
INLINE Pixel operator-(Pixel x, float y) { return {x.low - y, x.high - y}; }
INLINE Pixel operator*(Pixel x, float y) { return {x.low * y, x.high * y}; }
INLINE float sum_of(Pixel x) { return sum_of(x.low + x.high); }
// NaN goes through all of these, as in torch.
INLINE Vector rectified(Vector x) { return x < 0.0f ? Vector{} : x; }
INLINE Pixel rectified(Pixel x) { return {rectified(x.low), rectified(x.high)}; }
INLINE Vector where_positive(Vector y, Vector x) { return y <= 0.0f ? Vector{} : x; }
INLINE Pixel where_positive(Pixel y, Pixel x) { return {where_positive(y.low, x.low), where_positive(y.high, x.high)}; }
INLINE Vector larger_of(Vector x, Vector y) { return (y > x) | (y != y) ? y : x; }
INLINE Pixel larger_of(Pixel x, Pixel y) { return {larger_of(x.low, y.low), larger_of(x.high, y.high)}; }

// Square images. The distance of channels is an odd number of pixels: powers of 2 would lie in the
// same few lines of a cache.
struct Size {
  int channels, side;
  int area() const { return side * side; }
  int64_t plane() const { return (int64_t)(area() | 1) * IMAGES; }
  int64_t floats() const { return channels * plane(); }
};

// The images of a batch.
struct Batch {
  int images, blocks;
  float whole[IMAGES], rest[IMAGES];  // 1 for each image of a block, and of the last block
  explicit Batch(int count) : images(count), blocks((count + IMAGES - 1) / IMAGES) {
    for (int k = 0; k < IMAGES; k++) {
      whole[k] = 1.0f;
      rest[k] = (blocks - 1) * IMAGES + k < images;
    }
  }
  Pixel mask(int block) const { return at(block == blocks - 1 ? rest : whole); }
};

// ---- Numbers of LANES vectors, rearranged ------------------------------------------------------

constexpr int reversed(int n) {  // the bits of a number below LANES
  int found = 0;
  for (int bit = 1; bit < LANES; bit *= 2) found = found * 2 + (n / bit & 1);
  return found;
}
using Lanes = std::make_integer_sequence<int, LANES>;
#if !defined(__has_builtin)
#define __has_builtin(x) 0
#endif
#if __has_builtin(__builtin_shufflevector)
// Of each group of 2 * HALF numbers of a, and then of b, the first half (AT = 0) or the second.
template <int HALF, int AT, int... N> INLINE Vector halves(Vector a, Vector b, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(a, b, (N * 2 / LANES * LANES + N % (LANES / 2) / HALF * 2 * HALF + N % HALF + AT * HALF)...);
}
template <int... N> INLINE Vector in_order(Vector v, std::integer_sequence<int, N...>) { return __builtin_shufflevector(v, v, reversed(N)...); }
template <int HALF> INLINE void add_halves(Vector* v) {
  UNROLL
  for (int k = 0; k < HALF; k++) v[k] = halves<HALF, 0>(v[k], v[k + HALF], Lanes()) + halves<HALF, 1>(v[k], v[k + HALF], Lanes());
  if constexpr (HALF > 1) add_halves<HALF / 2>(v);
}
// The sum of each of LANES vectors.
INLINE Vector sums_of(const Vector* from) {
  Vector v[LANES];
  __builtin_memcpy(v, from, sizeof v);
  add_halves<LANES / 2>(v);
  return in_order(v[0], Lanes());
}
template <int HALF> INLINE void swap_halves(Vector* v) {
  for (int group = 0; group < LANES; group += 2 * HALF)
    UNROLL
    for (int k = group; k < group + HALF; k++) {
      const Vector first = halves<HALF, 0>(v[k], v[k + HALF], Lanes());
      v[k + HALF] = halves<HALF, 1>(v[k], v[k + HALF], Lanes()), v[k] = first;
    }
  if constexpr (HALF > 1) swap_halves<HALF / 2>(v);
}
// Vector n becomes number n of each row, of LANES rows.
template <class Row> INLINE void transpose(Row row, Vector* v) {
  UNROLL
  for (int k = 0; k < LANES; k++) v[reversed(k)] = *(const Vector*)row(k);
  swap_halves<LANES / 2>(v);
}
#else
INLINE Vector sums_of(const Vector* from) {
  Vector v;
  for (int n = 0; n < LANES; n++) v[n] = sum_of(from[n]);
  return v;
}
template <class Row> INLINE void transpose(Row row, Vector* v) {
  for (int k = 0; k < LANES; k++)
    for (int n = 0; n < LANES; n++) v[n][k] = row(k)[n];
}
#endif

// Image number of(k), [H][W][C], is written into place k of a block.
template <class Of> INLINE void gather(const float* image, Size size, Of of, float* to) {
  const int channels = size.channels, length = size.area() * channels;
  const float* from[IMAGES];
  for (int k = 0; k < IMAGES; k++) from[k] = image + of(k) * length;
  const auto place = [&](int n) { return to + n % channels * size.plane() + n / channels * IMAGES; };
  int n = 0;
  for (; n + LANES <= length; n += LANES)
    for (int half = 0; half < IMAGES; half += LANES) {
      Vector v[LANES];
      transpose([&](int k) { return from[half + k] + n; }, v);
      for (int k = 0; k < LANES; k++) *(Vector*)(place(n + k) + half) = v[k];
    }
  for (; n < length; n++)
    for (int k = 0; k < IMAGES; k++) place(n)[k] = from[k][n];
}

// act(block, channel, place of the plane), and act(channel, place) for each pixel.
template <class Act> INLINE void each_plane(Size size, int blocks, Act act) {
  for (int b = 0; b < blocks; b++)
    for (int c = 0; c < size.channels; c++) act(b, c, b * size.floats() + c * size.plane());
}
template <class Act> INLINE void each_pixel(Size size, int blocks, Act act) {
  each_plane(size, blocks, [&](int, int c, int64_t plane) {
    for (int p = 0; p < size.area(); p++) act(c, plane + p * IMAGES);
  });
}

// ---- Sums and means ----------------------------------------------------------------------------

// Sum over the pixels of a channel; of(block, place of the pixel) is a Pixel.
template <class Of> INLINE float sum_over(const Batch& batch, Size size, Of of) {
  enum { SUMS = 4 };  // which a processor computes at the same time
  Pixel sum[SUMS] = {};
  for (int b = 0; b < batch.blocks; b++) {
    int64_t place = b * size.floats();
    int p = 0;
    for (; p + SUMS <= size.area(); p += SUMS)
      UNROLL
      for (int k = 0; k < SUMS; k++, place += IMAGES) sum[k] = sum[k] + of(b, place);
    for (; p < size.area(); p++, place += IMAGES) sum[0] = sum[0] + of(b, place);
  }
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
static void sum_channels(const float* x, Size size, const Batch& batch, float* to) {
  for (int c = 0; c < size.channels; c++) to[c] = sum_over(batch, size, [&](int, int64_t place) { return at(x + c * size.plane() + place); });
}
// The mean of each plane, an image of one pixel.
static void mean_over_pixels(const float* h, Size size, float* to, int blocks) {
  each_plane(size, blocks, [&](int b, int c, int64_t plane) {
    Pixel sum = {};
    for (int p = 0; p < size.area(); p++) sum = sum + at(h + plane + p * IMAGES);
    put(to + b * Size{size.channels, 1}.floats() + c * IMAGES, sum * (1.0f / size.area()));
  });
}
// The gradient of that mean, written or added.
template <bool ADDED> static void spread_over_pixels(const float* g, Size size, float* to, int blocks) {
  each_plane(size, blocks, [&](int b, int c, int64_t plane) {
    const Pixel share = at(g + b * Size{size.channels, 1}.floats() + c * IMAGES) * (1.0f / size.area());
    for (int p = 0; p < size.area(); p++) put(to + plane + p * IMAGES, ADDED ? at(to + plane + p * IMAGES) + share : share);
  });
}
// The gradient of numbers that went through a relu, whose results are y.
static void through_relu(const float* y, float* g, int64_t floats) {
  for (int64_t k = 0; k < floats; k += IMAGES) put(g + k, where_positive(at(y + k), at(g + k)));
}

// ---- Convolutions ------------------------------------------------------------------------------

// The weight of output r, input c and tap t is at[r * row + c * column + t * step].
struct Kernel { const float* at; int side; int64_t row, column, step; };
INLINE Kernel kernel_of(const float* weight, int inputs, int side) {
  return {weight, side, (int64_t)inputs * side * side, side * side, 1};
}
// The kernel of the gradient of the input.
INLINE Kernel turned(Kernel k) { return {k.at + (k.side * k.side - 1) * k.step, k.side, k.column, k.row, -k.step}; }

// ROWS outputs for all pixels of a block.
template <int ROWS, int SIDE>
NOINLINE static void convolve_rows(const float* __restrict x, Size in, Kernel k, const float* bias, bool rectify, float* __restrict y, int64_t plane) {
  const int side = in.side, taps = SIDE ? SIDE : k.side, margin = taps / 2;
  const int64_t row = k.row, column = k.column, step = k.step, from_plane = in.plane();
  for (int h = 0; h < side; h++) {
    const int up = greatest(0, margin - h), down = smallest(taps, side + margin - h);
    for (int w = 0; w < side; w++) {
      const int left = greatest(0, margin - w), right = smallest(taps, side + margin - w);
      Pixel sum[ROWS];
      UNROLL
      for (int r = 0; r < ROWS; r++) sum[r] = Pixel{} + (bias ? bias[r] : 0.0f);
      for (int c = 0; c < in.channels; c++)
        for (int i = SIDE == 1 ? 0 : up; i < (SIDE == 1 ? 1 : down); i++) {
          const float* from = x + c * from_plane + ((h + i - margin) * side + w - margin) * IMAGES;
          const float* weight = k.at + c * column + i * taps * step;
          for (int j = SIDE == 1 ? 0 : left; j < (SIDE == 1 ? 1 : right); j++) {
            const Pixel pixel = at(from + j * IMAGES);
            UNROLL
            for (int r = 0; r < ROWS; r++) sum[r] = sum[r] + pixel * weight[r * row + j * step];
          }
        }
      float* to = y + (h * side + w) * IMAGES;
      UNROLL
      for (int r = 0; r < ROWS; r++) put(to + r * plane, rectify ? rectified(sum[r]) : sum[r]);
    }
  }
}
template <int ROWS>
INLINE void convolve_some(const float* x, Size in, Kernel k, const float* bias, bool rectify, float* y, int64_t plane) {
  if (k.side == 1) convolve_rows<ROWS, 1>(x, in, k, bias, rectify, y, plane);
  else if (k.side == 3) convolve_rows<ROWS, 3>(x, in, k, bias, rectify, y, plane);
  else convolve_rows<ROWS, 0>(x, in, k, bias, rectify, y, plane);
}
// Zeros around the image; bias may be null.
static void convolve(const float* x, Size in, Kernel k, const float* bias, bool rectify, float* y, Size out, int blocks) {
  enum { ROWS = LANES == 16 ? 8 : 4 };  // as many sums as registers hold
  const int64_t plane = out.plane();
  for (int b = 0; b < blocks; b++, x += in.floats(), y += out.floats())
    for (int r = 0; r < out.channels;) {
      Kernel mine = k;
      mine.at += r * k.row;
      const float* own = bias ? bias + r : nullptr;
      const int rest = out.channels - r;
      float* to = y + r * plane;
      if (ROWS == 8 && rest >= 8) convolve_some<8>(x, in, mine, own, rectify, to, plane), r += 8;
      else if (rest >= 4) convolve_some<4>(x, in, mine, own, rectify, to, plane), r += 4;
      else if (rest >= 2) convolve_some<2>(x, in, mine, own, rectify, to, plane), r += 2;
      else convolve_some<1>(x, in, mine, own, rectify, to, plane), r += 1;
    }
}

enum { TILE = 4 };  // outputs, and inputs, of which gradients are computed together
// Gradients of the weights of TILE outputs (pointers g) and COLUMNS inputs (x): for each tap, vectors
// [TILE][TILE], of which the first COLUMNS of a row are written.
template <int COLUMNS>
NOINLINE static void kernel_sums(const float* const* g, int64_t next_g, const float* const* x, int64_t next_x, int side, int taps, int blocks, Vector* sums) {
  enum { KEPT = 128 };  // pixels that stay in the cache
  const int margin = taps / 2, rows = greatest(1, KEPT / side);
  for (int b = 0; b < blocks; b++)
    for (int first = 0; first < side; first += rows)
      for (int i = 0; i < taps; i++)
        for (int j = 0; j < taps; j++) {
          Vector* mine = sums + (i * taps + j) * TILE * TILE;
          const int top = greatest(first, margin - i), bottom = smallest(smallest(first + rows, side), side + margin - i);
          const int left = greatest(0, margin - j), right = smallest(side, side + margin - j);
          const bool begins = b == 0 && first == 0;
          Vector s[TILE][COLUMNS];
          UNROLL
          for (int r = 0; r < TILE; r++)
            UNROLL
            for (int c = 0; c < COLUMNS; c++) s[r][c] = begins ? Vector{} : mine[r * TILE + c];
          for (int h = top; h < bottom; h++) {
            int64_t from_g = b * next_g + (h * side + left) * IMAGES;
            int64_t from_x = b * next_x + ((h + i - margin) * side + left + j - margin) * IMAGES;
            for (int n = 0; n < (right - left) * IMAGES; n += LANES, from_g += LANES, from_x += LANES) {
              Vector pixel[COLUMNS];
              UNROLL
              for (int c = 0; c < COLUMNS; c++) pixel[c] = *(const Vector*)(x[c] + from_x);
              UNROLL
              for (int r = 0; r < TILE; r++) {
                Vector gradient = *(const Vector*)(g[r] + from_g);
                IN_REGISTER(gradient);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) s[r][c] += gradient * pixel[c];
              }
            }
          }
          UNROLL
          for (int r = 0; r < TILE; r++)
            UNROLL
            for (int c = 0; c < COLUMNS; c++) mine[r * TILE + c] = s[r][c];
        }
}
// Gradients of the weights of a kernel, in the order of the weights; ``to`` takes the place of k.at.
static void kernel_gradient(const float* g, Size out, const float* x, Size in, Kernel k, int blocks, float* to, float* work) {
  const int side = k.side;
  const int64_t row = k.row, column = k.column;
  Vector* sums = (Vector*)work;
  for (int r = 0; r < out.channels; r += TILE)
    for (int c = 0; c < in.channels; c += TILE) {
      const float *gs[TILE], *xs[TILE];  // what is too much is computed again, and not used
      for (int n = 0; n < TILE; n++) gs[n] = g + smallest(r + n, out.channels - 1) * out.plane();
      for (int n = 0; n < TILE; n++) xs[n] = x + smallest(c + n, in.channels - 1) * in.plane();
      const int rows = smallest(TILE, out.channels - r), columns = smallest(TILE, in.channels - c);
      const auto compute = columns == 1 ? kernel_sums<1> : columns == 3 ? kernel_sums<3> : kernel_sums<TILE>;
      compute(gs, out.floats(), xs, in.floats(), in.side, side, blocks, sums);
      float* corner = to + r * row + c * column;
      for (int t = 0; t < side * side; t++, sums += TILE * TILE) {
        float found[TILE * TILE];
        UNROLL
        for (int n = 0; n < TILE * TILE; n += LANES) *(Vector*)(found + n) = sums_of(sums + n);
        if (rows == TILE && columns == TILE)
          UNROLL
          for (int n = 0; n < TILE * TILE; n++) corner[n / TILE * row + n % TILE * column + t] = found[n];
        else
          for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) corner[i * row + j * column + t] = found[i * TILE + j];
      }
      sums = (Vector*)work;
    }
}
// Floats of memory in which gradients of kernels are summed.
INLINE int64_t kernel_work(int side) { return (int64_t)side * side * TILE * TILE * LANES; }

// A convolution of each channel by itself, with 3x3 weights.
static void convolve_depth(const float* x, Size size, const float* weight, bool turn, float* y, int blocks) {
  const int side = size.side;
  for (int b = 0; b < blocks; b++)
    for (int c = 0; c < size.channels; c++) {
      const float* from = x + b * size.floats() + c * size.plane();
      float* to = y + b * size.floats() + c * size.plane();
      for (int h = 0; h < side; h++)
        for (int w = 0; w < side; w++) {
          Pixel sum = {};
          for (int i = greatest(0, 1 - h); i < smallest(3, side + 1 - h); i++)
            for (int j = greatest(0, 1 - w); j < smallest(3, side + 1 - w); j++) {
              const int tap = i * 3 + j;
              sum = sum + at(from + ((h + i - 1) * side + w + j - 1) * IMAGES) * weight[c * 9 + (turn ? 8 - tap : tap)];
            }
          put(to + (h * side + w) * IMAGES, sum);
        }
    }
}
static void depth_gradient(const float* g, const float* x, Size size, int blocks, float* to) {
  const int side = size.side;
  for (int c = 0; c < size.channels; c++)
    for (int i = 0; i < 3; i++)
      for (int j = 0; j < 3; j++) {
        Pixel total = {};
        for (int b = 0; b < blocks; b++) {
          const int64_t plane = b * size.floats() + c * size.plane();
          for (int h = greatest(0, 1 - i); h < smallest(side, side + 1 - i); h++)
            for (int w = greatest(0, 1 - j); w < smallest(side, side + 1 - j); w++)
              total = total + at(g + plane + (h * side + w) * IMAGES) * at(x + plane + ((h + i - 1) * side + w + j - 1) * IMAGES);
        }
        to[c * 9 + i * 3 + j] = sum_of(total);
      }
}

// ---- Batch norm, max pooling and relu ----------------------------------------------------------

// Mean and biased variance of a channel.
struct Moments { float mean, variance; };
INLINE Moments moments(const float* y, Size size, const Batch& batch) {
  const float count = (float)batch.images * size.area();
  const float mean = sum_over(batch, size, [&](int b, int64_t place) { return at(y + place) * batch.mask(b); }) / count;
  const float squares = sum_over(batch, size, [&](int b, int64_t place) {
    const Pixel centred = (at(y + place) - mean) * batch.mask(b);
    return centred * centred;
  });
  return {mean, squares / count};
}
// A channel: picked = the largest of sign * y in each window, out = relu(picked * factor + offset).
INLINE void pool(const float* y, Size wide, float sign, float factor, float offset, int window, float* picked, float* out, Size size, int blocks) {
  for (int b = 0; b < blocks; b++, y += wide.floats(), picked += size.floats(), out += size.floats())
    for (int h = 0; h < size.side; h++)
      for (int w = 0; w < size.side; w++) {
        const float* from = y + (h * wide.side + w) * window * IMAGES;
        Pixel most = at(from) * sign;
        for (int i = 0; i < window; i++)
          for (int j = i == 0; j < window; j++) most = larger_of(most, at(from + (i * wide.side + j) * IMAGES) * sign);
        const int p = (h * size.side + w) * IMAGES;
        put(picked + p, most);
        put(out + p, rectified(most * factor + offset));
      }
}
// y = (slope * sign * y + offset + factor * g where the window picked y) * sign, the gradient of y.
INLINE void unpool(float* y, Size wide, float sign, float slope, float offset, float factor, const float* g, const float* picked, const float* out, int window, Size size, const Batch& batch) {
  for (int b = 0; b < batch.blocks; b++, y += wide.floats(), g += size.floats(), picked += size.floats(), out += size.floats()) {
    const Pixel mask = batch.mask(b) * sign;
    const int covered = size.side * window;
    for (int h = 0; h < size.side; h++)
      for (int w = 0; w < size.side; w++) {
        const int p = (h * size.side + w) * IMAGES;
        const Pixel largest = at(picked + p);
        Pixel left = where_positive(at(out + p), at(g + p)) * factor;  // until it is placed
        float* to = y + (h * wide.side + w) * window * IMAGES;
        for (int i = 0; i < window; i++)
          for (int j = 0; j < window; j++) {
            float* place = to + (i * wide.side + j) * IMAGES;
            const Pixel x = at(place) * sign;
            const Pixel mine = {x.low == largest.low ? left.low : Vector{}, x.high == largest.high ? left.high : Vector{}};
            left = {x.low == largest.low ? Vector{} : left.low, x.high == largest.high ? Vector{} : left.high};
            put(place, (x * slope + offset + mine) * mask);
          }
      }
    if (covered < wide.side)  // pixels outside of all windows
      for (int h = 0; h < wide.side; h++)
        for (int w = h < covered ? covered : 0; w < wide.side; w++) {
          float* place = y + (h * wide.side + w) * IMAGES;
          put(place, (at(place) * sign * slope + offset) * mask);
        }
  }
}
