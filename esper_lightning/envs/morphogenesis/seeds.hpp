// Seeds, the modules that grow in a slot: h + gate * f(h), forward and backward. It follows images.hpp.
//
// The parameters of a seed are a row in the order of blueprints.py. Where a gradient is asked for, all
// of the row is written.

enum Blueprint { NORM, ATTENTION, DEPTHWISE, CONV_LIGHT, CONV_HEAVY, BOTTLENECK, LOW_RANK };
static const float EPS = 1e-5f;  // of layer norm and batch norm

// A seed as it is used in one pass.
struct Seed { int64_t kind; const float* row; float gate; };

// The memory of a slot, of activations of this size. ``middle`` has room for three images of one pixel.
struct Slot {
  Size size;
  float *h, *grown;         // without the seed, and with it
  float *middle, *active;   // within the seed
};

// Gradients of a slot, which is backward's memory.
struct Gradients {
  float* g;      // of ``grown``, and then of ``h``
  float* seed;   // of the seed's parameters; null where they do not learn
  float *other;  // as large as g
  float* sums;   // of kernel_gradient
};

// ---- Layer norm --------------------------------------------------------------------------------

// Mean over all numbers of each image of a block; of(channel, place) is a Pixel.
template <class Of> INLINE Pixel block_mean(Size size, Of of) {
  Pixel sum = {};
  each_pixel(size, 1, [&](int c, int64_t place) { sum = sum + of(c, place); });
  return sum * (1.0f / (size.channels * size.area()));
}
static void grow_norm(const Slot& slot, const Seed& seed, int blocks) {
  const Size size = slot.size;
  const float *scale = seed.row, *bias = seed.row + size.channels;
  for (int b = 0; b < blocks; b++) {
    const int64_t block = b * size.floats();
    const float* h = slot.h + block;
    const Pixel mean = block_mean(size, [&](int, int64_t place) { return at(h + place); });
    const Pixel variance = block_mean(size, [&](int, int64_t place) {
      const Pixel centred = at(h + place) - mean;
      return centred * centred;
    });
    float* rate = slot.middle + b * IMAGES;
    put(rate, variance + EPS);
    for (int k = 0; k < IMAGES; k++) rate[k] = 1.0f / f_sqrt(rate[k]);
    const Pixel factor = at(rate);
    each_pixel(size, 1, [&](int c, int64_t place) {
      const Pixel normed = (at(h + place) - mean) * factor;
      put(slot.active + block + place, normed);
      put(slot.grown + block + place, at(h + place) + normed * (scale[c] * seed.gate) + bias[c] * seed.gate);
    });
  }
}
static void backward_norm(const Slot& slot, const Seed& seed, const Gradients& to, const Batch& batch, bool passes) {
  const Size size = slot.size;
  const float* scale = seed.row;
  for (int c = 0; to.seed && c < size.channels; c++) {
    const float *g = to.g + c * size.plane(), *normed = slot.active + c * size.plane();
    to.seed[c] = seed.gate * sum_over(batch, size, [&](int, int64_t place) { return at(g + place) * at(normed + place); });
    to.seed[size.channels + c] = seed.gate * sum_over(batch, size, [&](int, int64_t place) { return at(g + place); });
  }
  for (int b = 0; passes && b < batch.blocks; b++) {
    float* g = to.g + b * size.floats();
    const float* normed = slot.active + b * size.floats();
    const auto mine = [&](int c, int64_t place) { return at(g + place) * (scale[c] * seed.gate); };
    const Pixel mean = block_mean(size, mine), rate = at(slot.middle + b * IMAGES);
    const Pixel slope = block_mean(size, [&](int c, int64_t place) { return mine(c, place) * at(normed + place); });
    each_pixel(size, 1, [&](int c, int64_t place) {
      put(g + place, at(g + place) + (mine(c, place) - mean - at(normed + place) * slope) * rate);
    });
  }
}

// ---- Squeeze and excite ------------------------------------------------------------------------

// Parameters of ATTENTION and its activations, which are images of one pixel.
struct Attention {
  Size wide, half;
  const float *squeeze, *squeeze_bias, *excite, *bias;
  float *pooled, *squeezed, *share;
  Attention(const Slot& slot, const float* row, int blocks) : wide{slot.size.channels, 1}, half{greatest(4, slot.size.channels / 2), 1} {
    squeeze = row, squeeze_bias = squeeze + half.channels * wide.channels;
    excite = squeeze_bias + half.channels, bias = excite + half.channels * wide.channels;
    pooled = slot.middle, squeezed = pooled + blocks * wide.floats(), share = squeezed + blocks * wide.floats();
  }
  Kernel squeezing() const { return kernel_of(squeeze, wide.channels, 1); }
  Kernel exciting() const { return kernel_of(excite, half.channels, 1); }
};
static void grow_attention(const Slot& slot, const Seed& seed, int blocks) {
  const Attention a(slot, seed.row, blocks);
  mean_over_pixels(slot.h, slot.size, a.pooled, blocks);
  convolve(a.pooled, a.wide, a.squeezing(), a.squeeze_bias, true, a.squeezed, a.half, blocks);
  convolve(a.squeezed, a.half, a.exciting(), a.bias, false, a.share, a.wide, blocks);
  for (int64_t k = 0; k < blocks * a.wide.floats(); k++) a.share[k] = f_tanh(0.5f * a.share[k]);
  each_plane(slot.size, blocks, [&](int b, int c, int64_t plane) {
    const Pixel factor = at(a.share + b * a.wide.floats() + c * IMAGES) * seed.gate + 1.0f;
    for (int64_t place = plane; place < plane + slot.size.area() * IMAGES; place += IMAGES) put(slot.grown + place, at(slot.h + place) * factor);
  });
}
static void backward_attention(const Slot& slot, const Seed& seed, const Gradients& to, const Batch& batch, bool passes) {
  const Size size = slot.size;
  const Attention a(slot, seed.row, batch.blocks);
  float *excited = to.other, *squeezed = to.other + batch.blocks * a.wide.floats();
  each_plane(size, batch.blocks, [&](int b, int c, int64_t plane) {
    const int64_t at_image = b * a.wide.floats() + c * IMAGES;
    const Pixel share = at(a.share + at_image), factor = share * seed.gate + 1.0f;
    Pixel sum = {};
    for (int64_t place = plane; place < plane + size.area() * IMAGES; place += IMAGES) {
      sum = sum + at(to.g + place) * at(slot.h + place);
      put(to.g + place, at(to.g + place) * factor);
    }
    put(excited + at_image, sum * (0.5f * seed.gate) * (share * share * -1.0f + 1.0f));
  });
  convolve(excited, a.wide, turned(a.exciting()), nullptr, false, squeezed, a.half, batch.blocks);
  through_relu(a.squeezed, squeezed, batch.blocks * a.half.floats());
  if (to.seed) {
    float *squeeze = to.seed, *squeeze_bias = squeeze + (a.squeeze_bias - a.squeeze);
    float *excite = squeeze + (a.excite - a.squeeze), *bias = squeeze + (a.bias - a.squeeze);
    kernel_gradient(excited, a.wide, a.squeezed, a.half, a.exciting(), batch.blocks, excite, to.sums);
    sum_channels(excited, a.wide, batch, bias);
    kernel_gradient(squeezed, a.half, a.pooled, a.wide, a.squeezing(), batch.blocks, squeeze, to.sums);
    sum_channels(squeezed, a.half, batch, squeeze_bias);
  }
  if (!passes) return;
  convolve(squeezed, a.half, turned(a.squeezing()), nullptr, false, excited, a.wide, batch.blocks);
  spread_over_pixels<true>(excited, size, to.g, batch.blocks);
}

// ---- Convolutions ------------------------------------------------------------------------------

// scale * relu(second(first(h)) + bias). Bias and scale come first in the row.
struct Convolutions {
  Size middle;                        // between the two
  int first_side, second_side;        // of kernels; 0: there is no first
  bool depthwise, rectified;          // of the first: each channel by itself; with a bias and a relu
  int64_t first, first_bias, second;  // places in the row
};
static Convolutions convolutions(int64_t kind, Size size) {
  const int c = size.channels, quarter = greatest(4, c / 4);
  const Size few = {quarter, size.side};
  const int64_t begin = 2 * c, dense = (int64_t)9 * c * c;
  switch (kind) {
    case DEPTHWISE: return {size, 3, 1, true, false, begin, 0, begin + 9 * c};
    case LOW_RANK: return {few, 3, 1, false, false, begin, 0, begin + 9 * c * quarter};
    case CONV_HEAVY: return {size, 3, 3, false, true, begin, begin + dense, begin + dense + c};
    case BOTTLENECK: return {few, 1, 3, false, true, begin, begin + c * quarter, begin + c * quarter + quarter};
    default: return {size, 0, 3, false, false, 0, 0, begin};
  }
}
static void grow_convolutions(const Slot& slot, const Seed& seed, int blocks) {
  const Size size = slot.size;
  const int c = size.channels;
  const float *row = seed.row, *from = slot.h;
  const Convolutions v = convolutions(seed.kind, size);
  if (v.first_side) {
    if (v.depthwise) convolve_depth(from, size, row + v.first, false, slot.middle, blocks);
    else convolve(from, size, kernel_of(row + v.first, c, v.first_side), v.rectified ? row + v.first_bias : nullptr, v.rectified, slot.middle, v.middle, blocks);
    from = slot.middle;
  }
  convolve(from, v.middle, kernel_of(row + v.second, v.middle.channels, v.second_side), row, true, slot.active, size, blocks);
  each_plane(size, blocks, [&](int, int k, int64_t plane) {
    const float factor = row[c + k] * seed.gate;
    for (int64_t place = plane; place < plane + size.area() * IMAGES; place += IMAGES) put(slot.grown + place, at(slot.h + place) + at(slot.active + place) * factor);
  });
}
static void backward_convolutions(const Slot& slot, const Seed& seed, const Gradients& to, const Batch& batch, bool passes) {
  const Size size = slot.size;
  const int c = size.channels, blocks = batch.blocks;
  const float* row = seed.row;
  const Convolutions v = convolutions(seed.kind, size);
  each_plane(size, blocks, [&](int, int k, int64_t plane) {
    const float factor = row[c + k] * seed.gate;
    for (int64_t place = plane; place < plane + size.area() * IMAGES; place += IMAGES) put(to.other + place, where_positive(at(slot.active + place), at(to.g + place) * factor));
  });
  const Kernel second = kernel_of(row + v.second, v.middle.channels, v.second_side);
  if (to.seed) {
    sum_channels(to.other, size, batch, to.seed);
    for (int k = 0; k < c; k++) {
      const float *g = to.g + k * size.plane(), *active = slot.active + k * size.plane();
      to.seed[c + k] = seed.gate * sum_over(batch, size, [&](int, int64_t place) { return at(g + place) * at(active + place); });
    }
    kernel_gradient(to.other, size, v.first_side ? slot.middle : slot.h, v.middle, second, blocks, to.seed + v.second, to.sums);
  }
  float* g = slot.grown;  // which nothing reads any more
  if (v.first_side || passes) convolve(to.other, size, turned(second), nullptr, false, g, v.middle, blocks);
  if (v.first_side) {
    if (v.rectified) through_relu(slot.middle, g, blocks * v.middle.floats());
    const Kernel first = kernel_of(row + v.first, c, v.first_side);
    if (to.seed) {
      if (v.depthwise) depth_gradient(g, slot.h, size, blocks, to.seed + v.first);
      else kernel_gradient(g, v.middle, slot.h, size, first, blocks, to.seed + v.first, to.sums);
      if (v.rectified) sum_channels(g, v.middle, batch, to.seed + v.first_bias);
    }
    if (passes && v.depthwise) convolve_depth(g, size, row + v.first, true, to.other, blocks);
    else if (passes) convolve(g, v.middle, turned(first), nullptr, false, to.other, size, blocks);
    g = to.other;
  }
  if (passes)
    for (int64_t k = 0; k < blocks * size.floats(); k += IMAGES) put(to.g + k, at(to.g + k) + at(g + k));
}

// ---- Any seed ----------------------------------------------------------------------------------

static int64_t count_parameters(int64_t kind, Size size) {
  const int64_t c = size.channels, half = greatest(4, size.channels / 2);
  if (kind == NORM) return 2 * c;
  if (kind == ATTENTION) return 2 * half * c + half + c;
  const Convolutions v = convolutions(kind, size);
  return v.second + c * v.middle.channels * v.second_side * v.second_side;
}
static void grow(const Slot& slot, const Seed& seed, int blocks) {
  if (seed.kind == NORM) grow_norm(slot, seed, blocks);
  else if (seed.kind == ATTENTION) grow_attention(slot, seed, blocks);
  else grow_convolutions(slot, seed, blocks);
}
// Where ``passes`` is false, the gradient of ``h`` is not computed.
static void backward_seed(const Slot& slot, const Seed& seed, const Gradients& to, const Batch& batch, bool passes) {
  if (seed.kind == NORM) backward_norm(slot, seed, to, batch, passes);
  else if (seed.kind == ATTENTION) backward_attention(slot, seed, to, batch, passes);
  else backward_convolutions(slot, seed, to, batch, passes);
}
