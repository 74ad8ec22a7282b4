// Operations on the images of one host, forward and backward. It follows kernels.hpp.
//
// Activations are [block][channel][pixel][image]: the vectors of a processor lie along the images,
// and a weight is one number for all of them. A block has IMAGES images. The last block of a batch
// is filled with copies of its last image, whose gradients are 0.

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

// Image number of(k) is written into place k of a block.
template <class Of> INLINE void gather(const float* image, Size size, Of of, float* to) {
  enum { NEAR = 16 };  // pixels whose places stay in the cache
  const int64_t length = (int64_t)size.area() * size.channels;
  for (int first = 0; first < size.area(); first += NEAR)
    for (int k = 0; k < IMAGES; k++) {
      const float* from = image + of(k) * length;
      for (int p = first; p < smallest(first + NEAR, size.area()); p++)
        for (int c = 0; c < size.channels; c++) to[c * size.plane() + p * IMAGES + k] = from[(int64_t)p * size.channels + c];
    }
}

// Sum over the pixels of a channel; of(block, offset of the pixel) is a Pixel.
template <class Of> INLINE float sum_over(const Batch& batch, Size size, Of of) {
  enum { NEAR = 32 };  // fewer numbers in a sum round less
  Pixel total = {};
  for (int b = 0; b < batch.blocks; b++)
    for (int first = 0; first < size.area(); first += NEAR) {
      Pixel sum = {};
      for (int p = first; p < smallest(first + NEAR, size.area()); p++) sum = sum + of(b, p * IMAGES);
      total = total + sum;
    }
  return sum_of(total);
}
static void sum_channels(const float* x, Size size, const Batch& batch, float* to) {
  for (int c = 0; c < size.channels; c++)
    to[c] = sum_over(batch, size, [&](int b, int p) { return at(x + b * size.floats() + c * size.plane() + p); });
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

// The sum of each of LANES vectors.
#if defined(__GNUC__) && !defined(__clang__)
typedef int Places __attribute__((vector_size(LANES * 4)));
INLINE void sums_of(Vector* v, float* to) {
  UNROLL
  for (int half = LANES / 2; half > 0; half /= 2) {
    Places first, second;  // of the numbers of two vectors
    UNROLL
    for (int n = 0; n < LANES; n++) {
      const int m = n % (LANES / 2);
      first[n] = (n < LANES / 2 ? 0 : LANES) + m / half * 2 * half + m % half;
      second[n] = first[n] + half;
    }
    UNROLL
    for (int k = 0; k < half; k++) v[k] = __builtin_shuffle(v[k], v[k + half], first) + __builtin_shuffle(v[k], v[k + half], second);
  }
  float sums[LANES];
  __builtin_memcpy(sums, v, sizeof sums);
  UNROLL
  for (int n = 0; n < LANES; n++) {
    int from = 0;  // the bits of n in reverse
    for (int bit = 1; bit < LANES; bit *= 2) from = from * 2 + (n / bit & 1);
    to[from] = sums[n];
  }
}
#else
INLINE void sums_of(Vector* v, float* to) {
  for (int n = 0; n < LANES; n++) to[n] = sum_of(v[n]);
}
#endif

enum { GRADIENT_ROWS = 4, GRADIENT_COLUMNS = 4 };
// Gradients of the weights of up to GRADIENT_ROWS outputs (pointers g) and COLUMNS inputs (x).
template <int COLUMNS>
NOINLINE static void kernel_sums(const float* const* g, int64_t next_g, const float* const* x, int64_t next_x, int side, int taps, int blocks, Vector* sums) {
  enum { ROWS = GRADIENT_ROWS, KEPT = 128 };  // pixels that stay in the cache
  const int margin = taps / 2, rows = greatest(1, KEPT / side);
  for (int n = 0; n < taps * taps * ROWS * COLUMNS; n++) sums[n] = Vector{};
  for (int b = 0; b < blocks; b++)
    for (int first = 0; first < side; first += rows)
      for (int i = 0; i < taps; i++)
        for (int j = 0; j < taps; j++) {
          Vector* mine = sums + (i * taps + j) * ROWS * COLUMNS;
          const int top = greatest(first, margin - i), bottom = smallest(smallest(first + rows, side), side + margin - i);
          const int left = greatest(0, margin - j), right = smallest(side, side + margin - j);
          if (top >= bottom || left >= right) continue;
          Vector s[ROWS][COLUMNS];
          UNROLL
          for (int r = 0; r < ROWS; r++)
            UNROLL
            for (int c = 0; c < COLUMNS; c++) s[r][c] = mine[r * COLUMNS + c];
          for (int h = top; h < bottom; h++) {
            int64_t from_g = b * next_g + (h * side + left) * IMAGES;
            int64_t from_x = b * next_x + ((h + i - margin) * side + left + j - margin) * IMAGES;
            for (int n = 0; n < (right - left) * IMAGES; n += LANES, from_g += LANES, from_x += LANES) {
              Vector pixel[COLUMNS];
              UNROLL
              for (int c = 0; c < COLUMNS; c++) pixel[c] = *(const Vector*)(x[c] + from_x);
              UNROLL
              for (int r = 0; r < ROWS; r++) {
                const Vector gradient = *(const Vector*)(g[r] + from_g);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) s[r][c] += gradient * pixel[c];
              }
            }
          }
          UNROLL
          for (int r = 0; r < ROWS; r++)
            UNROLL
            for (int c = 0; c < COLUMNS; c++) mine[r * COLUMNS + c] = s[r][c];
        }
}
// to[r * row + c * column + t] = gradient of the weight of output r, input c and tap t.
static void kernel_gradient(const float* g, Size out, const float* x, Size in, int side, int blocks, float* to, int64_t row, int64_t column, float* work) {
  enum { ROWS = GRADIENT_ROWS, MOST = GRADIENT_COLUMNS };
  Vector* sums = (Vector*)work;
  for (int r = 0; r < out.channels; r += ROWS)
    for (int c = 0, columns; c < in.channels; c += columns) {
      const int rest = in.channels - c;
      columns = rest == 3 ? 3 : rest == 1 ? 1 : MOST;
      const float *gs[ROWS], *xs[MOST];  // what is too much is computed again, and not used
      for (int k = 0; k < ROWS; k++) gs[k] = g + smallest(r + k, out.channels - 1) * out.plane();
      for (int k = 0; k < MOST; k++) xs[k] = x + smallest(c + k, in.channels - 1) * in.plane();
      if (columns == 3) kernel_sums<3>(gs, out.floats(), xs, in.floats(), in.side, side, blocks, sums);
      else if (columns == 1) kernel_sums<1>(gs, out.floats(), xs, in.floats(), in.side, side, blocks, sums);
      else kernel_sums<MOST>(gs, out.floats(), xs, in.floats(), in.side, side, blocks, sums);
      const int count = side * side * ROWS * columns;
      for (int n = 0; n < count; n += LANES) {  // there is room for the last vectors
        float found[LANES];
        sums_of(sums + n, found);
        for (int k = 0; k < smallest(LANES, count - n); k++) {
          const int tap = (n + k) / (ROWS * columns), rc = (n + k) % (ROWS * columns);
          const int rr = r + rc / columns, cc = c + rc % columns;
          if (rr < out.channels && cc < in.channels) to[rr * row + cc * column + tap] = found[k];
        }
      }
    }
}
// Floats of memory in which gradients of kernels are summed.
INLINE int64_t kernel_work(int side) { return (int64_t)(side * side * GRADIENT_ROWS * GRADIENT_COLUMNS + LANES) * LANES; }

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
INLINE void moments(const float* y, Size size, const Batch& batch, float* mean, float* variance) {
  const float count = (float)batch.images * size.area();
  const int64_t next = size.floats();
  const float middle = sum_over(batch, size, [&](int b, int p) { return at(y + b * next + p) * batch.mask(b); }) / count;
  *mean = middle;
  *variance = sum_over(batch, size, [&](int b, int p) {
    const Pixel centred = (at(y + b * next + p) - middle) * batch.mask(b);
    return centred * centred;
  }) / count;
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
