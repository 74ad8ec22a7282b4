// Training and measurement of hosts with their seeds. It follows images.hpp.
//
// A thread computes one host after another. The arithmetic of a host depends on nothing else, so it
// rounds alike whatever hosts are beside it, and on any number of threads.

// As in lifecycle.py and blueprints.py.
enum Stage { DORMANT, TRAINING, BLENDING, HOLDING, FOSSILIZED, FADING, EMBARGOED };
enum Blueprint { NORM, ATTENTION, DEPTHWISE, CONV_LIGHT, CONV_HEAVY, BOTTLENECK, LOW_RANK };
INLINE bool is_attached(int64_t stage) { return stage >= BLENDING && stage <= FADING; }
INLINE bool is_judged(int64_t stage) { return stage >= TRAINING && stage <= FADING && stage != FOSSILIZED; }

static const float EPS = 1e-5f, MOMENTUM = 0.1f;  // of batch norm and layer norm

// What Python passes. Rows are those of hosts.
struct Task {
  int64_t hosts, slots, classes, channels, side;           // of an image
  const int64_t *widths, *kernels, *pools;                 // [S]
  int64_t row;                                             // parameters of a host
  const int64_t* seed_row;                                 // [S], parameters of a seed, with padding
  float *host, *host_speed;                                // [B, P]
  float *const *seeds, *const *seed_speeds;                // of each slot [B, P]
  float *const *means, *const *variances;                  // of each slot [B, C]
  const int64_t *stage, *blueprint;                        // [B, S]
  const float* alpha;                                      // [B, S]
  const uint8_t* present;                                  // [B, K], whether a class occurs
  const int64_t* used;                                     // [B, S], channels that are not 0
  const float* image;                                      // [I, H, W, C]
  const int64_t *label, *index;                            // [B, U, M]; in measurements [I], null
  int64_t updates, images;                                 // U, M; in measurements 1, I
  const float* learning_rate;                              // [B]
  float momentum, weight_decay, max_grad_norm;
  uint8_t* finite;                                         // [B]
  float* grad_norm;                                        // [B, S]
  uint8_t switches;                                        // whether contributions are measured
  float *loss, *accuracy, *contribution;                   // [B], [B], [B, S]
  char* work;
  int64_t work_bytes;                                      // of a thread
  int64_t next;                                            // the first host that no thread has taken
};

// Memory that is handed out piece by piece; without a begin it only counts.
struct Memory {
  float* begin;
  int64_t used;
  float* take(int64_t floats) {
    float* piece = begin ? begin + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};

// Where the parameters of a seed of convolutions are. It is scale * relu(second(first(h)) + bias).
struct Convolutions {
  int middle, side;              // channels between the two, and side of the second kernel
  int first_side;                // 0: there is no first
  bool depthwise, rectified;     // of the first; whether it has a bias and a relu
  int64_t first, first_bias, second;  // bias and scale come first
};
static Convolutions convolutions(int64_t kind, int c) {
  const int quarter = greatest(4, c / 4);
  const int64_t begin = 2 * c, dense = (int64_t)9 * c * c;
  switch (kind) {
    case DEPTHWISE: return {c, 1, 3, true, false, begin, 0, begin + 9 * c};
    case LOW_RANK: return {quarter, 1, 3, false, false, begin, 0, begin + (int64_t)9 * c * quarter};
    case CONV_HEAVY: return {c, 3, 3, false, true, begin, begin + dense, begin + dense + c};
    case BOTTLENECK: return {quarter, 3, 1, false, true, begin, begin + (int64_t)quarter * c, begin + (int64_t)quarter * c + quarter};
    default: return {c, 3, 0, false, false, 0, 0, begin};
  }
}
static int64_t count_parameters(int64_t kind, int c) {
  const int half = greatest(4, c / 2);
  if (kind == NORM) return 2 * c;
  if (kind == ATTENTION) return (int64_t)2 * half * c + half + c;
  const Convolutions v = convolutions(kind, c);
  return v.second + (int64_t)c * v.middle * v.side * v.side;
}

// A block of the host with the slot after it.
struct Level {
  Size in, wide, out;                           // before, within and after the block
  int kernel, window;
  int64_t weight, scale, shift;                 // places in the host's row
  const float* input;
  float *y, *picked, *h;                        // convolution; what pooling picked; the block's output
  float *middle, *active, *grown;               // of the seed, and its sum with h
  const float* output;                          // h, or grown
  float *mean, *rate;                           // [C] of the batch
};

// A seed as it is used in one pass.
struct Seed { int64_t kind; const float* row; float gate; };

struct Network {
  const Task& task;
  Level* level;
  Size head;                                    // the last activations
  int64_t head_weight, head_bias;
  float *image, *pooled, *logits, *g, *other, *sums;
  float *host_grad, **seed_grad;
  uint8_t* own_memory;

  enum { MOST_SLOTS = 64 };
  Level levels[MOST_SLOTS];
  float* seed_grads[MOST_SLOTS];

  Network(const Task& task, int blocks, Memory& memory) : task(task), level(levels), seed_grad(seed_grads) {
    Size in = {(int)task.channels, (int)task.side};
    image = memory.take(blocks * in.floats());
    int64_t at = 0, most = 0, work = kernel_work(3);
    for (int s = 0; s < task.slots; s++) {
      Level& l = level[s];
      const int c = (int)task.widths[s];
      l.kernel = (int)task.kernels[s], l.window = (int)task.pools[s];
      l.in = in, l.wide = {c, in.side}, l.out = {c, in.side / l.window};
      l.weight = at, l.scale = at + (int64_t)c * in.channels * l.kernel * l.kernel;
      l.shift = l.scale + c, at = l.shift + c;
      l.y = memory.take(blocks * l.wide.floats());
      const int64_t size = blocks * l.out.floats();
      l.picked = l.window == 1 ? l.y : memory.take(size);
      l.h = memory.take(size), l.active = memory.take(size), l.grown = memory.take(size);
      const int64_t small = blocks * 3 * Size{c, 1}.floats();
      l.middle = memory.take(size > small ? size : small);
      l.mean = memory.take(c), l.rate = memory.take(c);
      seed_grad[s] = memory.take(task.seed_row[s]);
      if (size > most) most = size;
      if (small > most) most = small;
      if (kernel_work(l.kernel) > work) work = kernel_work(l.kernel);
      in = l.out;
    }
    head = in, head_weight = at, head_bias = at + in.channels * task.classes;
    pooled = memory.take(blocks * Size{in.channels, 1}.floats());
    logits = memory.take(blocks * Size{(int)task.classes, 1}.floats());
    g = memory.take(most), other = memory.take(most), sums = memory.take(work);
    host_grad = memory.take(task.row);
  }

  // ---- Forward ---------------------------------------------------------------------------------

  // A block. Batch norm uses the running statistics, or else those of the batch, which may update
  // the running ones.
  void run_block(Level& l, const float* row, const float* input, const Batch& batch, int64_t used, float* mean, float* variance, bool training) {
    l.input = input;
    convolve(input, l.in, kernel_of(row + l.weight, l.in.channels, l.kernel), nullptr, false, l.y, l.wide, batch.blocks);
    for (int c = 0; c < l.out.channels; c++) {
      const float* y = l.y + c * l.wide.plane();
      float middle, spread;
      if (training) {
        moments(y, l.wide, batch, &middle, &spread);
        if (mean) {
          const float count = (float)batch.images * l.wide.area();
          mean[c] += MOMENTUM * (middle - mean[c]);
          variance[c] += MOMENTUM * (spread * (count / (count > 2.0f ? count - 1.0f : 1.0f)) - variance[c]);
        }
      } else {
        middle = mean[c], spread = variance[c];
      }
      const float scale = row[l.scale + c], sign = scale < 0.0f ? -1.0f : 1.0f;
      l.mean[c] = middle, l.rate[c] = 1.0f / f_sqrt(spread + EPS);
      const float factor = scale * sign * l.rate[c], offset = row[l.shift + c] - factor * sign * middle;
      const int64_t plane = c * l.out.plane();
      pool(y, l.wide, sign, factor, offset, l.window, l.picked + plane, l.h + plane, l.out, batch.blocks);
      if (c >= used)  // and no gradient comes through the relu
        for (int b = 0; b < batch.blocks; b++) __builtin_memset(l.h + b * l.out.floats() + plane, 0, l.out.plane() * sizeof(float));
    }
    l.output = l.h;
  }

  // grown = h + gate * f(h).
  void grow(Level& l, const Seed& seed, const Batch& batch) {
    const Size size = l.out;
    const int c = size.channels;
    const int64_t next = size.floats(), plane = size.plane();
    const float* row = seed.row;
    l.output = l.grown;
    if (seed.kind == NORM) {
      for (int b = 0; b < batch.blocks; b++) {
        const float* h = l.h + b * next;
        Pixel mean = {}, variance = {};
        for (int k = 0; k < c; k++) for (int p = 0; p < size.area(); p++) mean = mean + at(h + k * plane + p * IMAGES);
        mean = mean * (1.0f / (c * size.area()));
        for (int k = 0; k < c; k++) for (int p = 0; p < size.area(); p++) {
          const Pixel centred = at(h + k * plane + p * IMAGES) - mean;
          variance = variance + centred * centred;
        }
        float rate[IMAGES];
        put(rate, variance * (1.0f / (c * size.area())) + EPS);
        for (int k = 0; k < IMAGES; k++) rate[k] = 1.0f / f_sqrt(rate[k]);
        put(l.middle + b * IMAGES, at(rate));
        for (int k = 0; k < c; k++) for (int p = 0; p < size.area(); p++) {
          const int64_t place = k * plane + p * IMAGES;
          const Pixel normed = (at(h + place) - mean) * at(rate);
          put(l.active + b * next + place, normed);
          put(l.grown + b * next + place, at(h + place) + normed * (row[k] * seed.gate) + row[c + k] * seed.gate);
        }
      }
      return;
    }
    if (seed.kind == ATTENTION) {
      const Attention a = attention(l, batch);
      means(l.h, size, a.pooled, batch.blocks);
      convolve(a.pooled, a.wide, kernel_of(row, c, 1), row + a.half.channels * c, true, a.squeezed, a.half, batch.blocks);
      const float* excite = row + a.half.channels * (c + 1);
      convolve(a.squeezed, a.half, kernel_of(excite, a.half.channels, 1), excite + a.half.channels * c, false, a.share, a.wide, batch.blocks);
      for (int64_t k = 0; k < batch.blocks * a.wide.floats(); k++) a.share[k] = f_tanh(0.5f * a.share[k]);
      for (int b = 0; b < batch.blocks; b++) for (int k = 0; k < c; k++) {
        const Pixel factor = at(a.share + (b * c + k) * IMAGES) * seed.gate;
        for (int p = 0; p < size.area(); p++) {
          const int64_t place = b * next + k * plane + p * IMAGES;
          put(l.grown + place, at(l.h + place) + at(l.h + place) * factor);
        }
      }
      return;
    }
    const Convolutions v = convolutions(seed.kind, c);
    const Size middle = {v.middle, size.side};
    const float* from = l.h;
    if (v.depthwise) convolve_depth(l.h, size, row + v.first, false, l.middle, batch.blocks);
    else if (v.first_side) convolve(l.h, size, kernel_of(row + v.first, c, v.first_side), v.rectified ? row + v.first_bias : nullptr, v.rectified, l.middle, middle, batch.blocks);
    if (v.first_side) from = l.middle;
    convolve(from, middle, kernel_of(row + v.second, v.middle, v.side), row, true, l.active, size, batch.blocks);
    for (int b = 0; b < batch.blocks; b++) for (int k = 0; k < c; k++) {
      const float factor = row[c + k] * seed.gate;
      for (int p = 0; p < size.area(); p++) {
        const int64_t place = b * next + k * plane + p * IMAGES;
        put(l.grown + place, at(l.h + place) + at(l.active + place) * factor);
      }
    }
  }

  static void means(const float* h, Size size, float* to, int blocks) {
    for (int b = 0; b < blocks; b++) for (int c = 0; c < size.channels; c++) {
      Pixel sum = {};
      for (int p = 0; p < size.area(); p++) sum = sum + at(h + b * size.floats() + c * size.plane() + p * IMAGES);
      put(to + (b * size.channels + c) * IMAGES, sum * (1.0f / size.area()));
    }
  }
  // Activations within ATTENTION, images of one pixel.
  struct Attention { Size wide, half; float *pooled, *squeezed, *share; };
  static Attention attention(const Level& l, const Batch& batch) {
    const Size wide = {l.out.channels, 1}, half = {greatest(4, l.out.channels / 2), 1};
    float* begin = l.middle;
    return {wide, half, begin, begin + batch.blocks * wide.floats(), begin + 2 * batch.blocks * wide.floats()};
  }

  void classify(const float* row, const float* h, const Batch& batch) {
    means(h, head, pooled, batch.blocks);
    const Kernel weight = {row + head_weight, 1, 1, task.classes, 1};
    convolve(pooled, {head.channels, 1}, weight, row + head_bias, false, logits, {(int)task.classes, 1}, batch.blocks);
  }
  // Cross-entropy of each image of a block and its class. The logits become the gradient of the sum.
  void cross_entropy(float* logit, const uint8_t* present, const int* label, float* loss, int* answer) const {
    float top[IMAGES], total[IMAGES], own[IMAGES];
    for (int n = 0; n < IMAGES; n++) top[n] = -__builtin_inff(), total[n] = 0.0f, own[n] = -__builtin_inff(), answer[n] = 0;
    for (int k = 0; k < task.classes; k++) {
      if (!present[k]) continue;
      const float* x = logit + k * IMAGES;
      for (int n = 0; n < IMAGES; n++) {
        const bool better = (x[n] > top[n] || x[n] != x[n]) && top[n] == top[n];
        top[n] = better ? x[n] : top[n];
        answer[n] = better ? k : answer[n];
        own[n] = label[n] == k ? x[n] : own[n];
      }
    }
    for (int k = 0; k < task.classes; k++) {
      float* x = logit + k * IMAGES;
      for (int n = 0; n < IMAGES; n++) {
        const float share = present[k] ? f_exp(x[n] - top[n]) : 0.0f;
        own[n] = label[n] == k ? x[n] : own[n];
        x[n] = share, total[n] += share;
      }
    }
    for (int n = 0; n < IMAGES; n++) loss[n] = f_log(total[n]) + top[n] - own[n];
    for (int k = 0; k < task.classes; k++) {
      float* x = logit + k * IMAGES;
      for (int n = 0; n < IMAGES; n++) x[n] = x[n] / total[n] - (label[n] == k ? 1.0f : 0.0f);
    }
  }

  // ---- Backward --------------------------------------------------------------------------------

  // From the gradient of the head's logits to g, the gradient of the last activations.
  void backward_head(const float* row, float* grad, const Batch& batch) {
    const Size few = {head.channels, 1}, answers = {(int)task.classes, 1};
    if (grad) {
      kernel_gradient(logits, answers, pooled, few, 1, batch.blocks, grad + head_weight, 1, task.classes, sums);
      sum_channels(logits, answers, batch, grad + head_bias);
    }
    convolve(logits, answers, turned({row + head_weight, 1, 1, task.classes, 1}), nullptr, false, other, few, batch.blocks);
    spread(other, head, g, batch.blocks, false);
  }
  // The gradient of a mean over pixels, written or added.
  static void spread(const float* from, Size size, float* to, int blocks, bool adds) {
    for (int b = 0; b < blocks; b++) for (int c = 0; c < size.channels; c++) {
      const Pixel x = at(from + (b * size.channels + c) * IMAGES) * (1.0f / size.area());
      for (int p = 0; p < size.area(); p++) {
        float* place = to + b * size.floats() + c * size.plane() + p * IMAGES;
        put(place, adds ? at(place) + x : x);
      }
    }
  }

  // g of the slot's output becomes g of its input; grad may be null.
  void backward_seed(Level& l, const Seed& seed, float* grad, const Batch& batch, bool passes) {
    const Size size = l.out;
    const int c = size.channels;
    const int64_t next = size.floats(), plane = size.plane();
    const float* row = seed.row;
    if (seed.kind == NORM) {
      if (grad) for (int k = 0; k < c; k++) {
        grad[k] = seed.gate * sum_over(batch, size, [&](int b, int p) { return at(g + b * next + k * plane + p) * at(l.active + b * next + k * plane + p); });
        grad[c + k] = seed.gate * sum_over(batch, size, [&](int b, int p) { return at(g + b * next + k * plane + p); });
      }
      if (!passes) return;
      for (int b = 0; b < batch.blocks; b++) {
        Pixel mean = {}, slope = {};
        for (int k = 0; k < c; k++) for (int p = 0; p < size.area(); p++) {
          const int64_t place = b * next + k * plane + p * IMAGES;
          const Pixel mine = at(g + place) * (row[k] * seed.gate);
          mean = mean + mine, slope = slope + mine * at(l.active + place);
        }
        mean = mean * (1.0f / (c * size.area())), slope = slope * (1.0f / (c * size.area()));
        const Pixel rate = at(l.middle + b * IMAGES);
        for (int k = 0; k < c; k++) for (int p = 0; p < size.area(); p++) {
          const int64_t place = b * next + k * plane + p * IMAGES;
          const Pixel mine = at(g + place) * (row[k] * seed.gate);
          put(g + place, at(g + place) + (mine - mean - at(l.active + place) * slope) * rate);
        }
      }
      return;
    }
    if (seed.kind == ATTENTION) {
      const Attention a = attention(l, batch);
      const int half = a.half.channels;
      float* z = other;  // gradients of the excitation, then of the squeeze
      float* squeezed = other + batch.blocks * a.wide.floats();
      for (int b = 0; b < batch.blocks; b++) for (int k = 0; k < c; k++) {
        const Pixel share = at(a.share + (b * c + k) * IMAGES);
        Pixel sum = {};
        for (int p = 0; p < size.area(); p++) {
          const int64_t place = b * next + k * plane + p * IMAGES;
          sum = sum + at(g + place) * at(l.h + place);
          put(g + place, at(g + place) + at(g + place) * (share * seed.gate));
        }
        put(z + (b * c + k) * IMAGES, sum * (seed.gate * 0.5f) * (share * share * -1.0f + 1.0f));
      }
      float* squeeze_grad = grad;
      const float* excite = row + half * (c + 1);
      if (grad) {
        float* excite_grad = grad + half * (c + 1);
        kernel_gradient(z, a.wide, a.squeezed, a.half, 1, batch.blocks, excite_grad, half, 1, sums);
        sum_channels(z, a.wide, batch, excite_grad + half * c);
      }
      convolve(z, a.wide, turned(kernel_of(excite, half, 1)), nullptr, false, squeezed, a.half, batch.blocks);
      for (int64_t k = 0; k < batch.blocks * a.half.floats(); k += IMAGES) put(squeezed + k, where_positive(at(a.squeezed + k), at(squeezed + k)));
      if (grad) {
        kernel_gradient(squeezed, a.half, a.pooled, a.wide, 1, batch.blocks, squeeze_grad, c, 1, sums);
        sum_channels(squeezed, a.half, batch, squeeze_grad + half * c);
      }
      if (!passes) return;
      convolve(squeezed, a.half, turned(kernel_of(row, c, 1)), nullptr, false, z, a.wide, batch.blocks);
      spread(z, size, g, batch.blocks, true);
      return;
    }
    const Convolutions v = convolutions(seed.kind, c);
    const Size middle = {v.middle, size.side};
    float* inner = l.grown;  // which nothing reads any more
    for (int k = 0; k < c; k++) {
      const float factor = row[c + k] * seed.gate;
      if (grad) grad[c + k] = seed.gate * sum_over(batch, size, [&](int b, int p) { return at(g + b * next + k * plane + p) * at(l.active + b * next + k * plane + p); });
      for (int b = 0; b < batch.blocks; b++) for (int p = 0; p < size.area(); p++) {
        const int64_t place = b * next + k * plane + p * IMAGES;
        put(other + place, where_positive(at(l.active + place), at(g + place) * factor));
      }
    }
    const float* from = v.first_side ? l.middle : l.h;
    if (grad) {
      sum_channels(other, size, batch, grad);
      kernel_gradient(other, size, from, middle, v.side, batch.blocks, grad + v.second, (int64_t)v.middle * v.side * v.side, v.side * v.side, sums);
    }
    if (!v.first_side && !passes) return;
    convolve(other, size, turned(kernel_of(row + v.second, v.middle, v.side)), nullptr, false, inner, middle, batch.blocks);
    if (v.first_side) {
      if (v.rectified)
        for (int64_t k = 0; k < batch.blocks * middle.floats(); k += IMAGES) put(inner + k, where_positive(at(l.middle + k), at(inner + k)));
      if (grad && v.depthwise) depth_gradient(inner, l.h, size, batch.blocks, grad + v.first);
      else if (grad) kernel_gradient(inner, middle, l.h, size, v.first_side, batch.blocks, grad + v.first, (int64_t)c * v.first_side * v.first_side, v.first_side * v.first_side, sums);
      if (grad && v.rectified) sum_channels(inner, middle, batch, grad + v.first_bias);
      if (!passes) return;
      if (v.depthwise) convolve_depth(inner, size, row + v.first, true, other, batch.blocks);
      else convolve(inner, middle, turned(kernel_of(row + v.first, c, v.first_side)), nullptr, false, other, size, batch.blocks);
      inner = other;
    }
    for (int64_t k = 0; k < batch.blocks * next; k += IMAGES) put(g + k, at(g + k) + at(inner + k));
  }

  // g of the block's output becomes g of its input, if that is wanted.
  void backward_block(Level& l, const float* row, float* grad, const Batch& batch, bool passes) {
    const float count = (float)batch.images * l.wide.area();
    const int64_t next = l.out.floats();
    for (int c = 0; c < l.out.channels; c++) {
      const int64_t plane = c * l.out.plane();
      const float *mine = g + plane, *h = l.h + plane, *picked = l.picked + plane;
      const float shift_grad = sum_over(batch, l.out, [&](int b, int p) { return where_positive(at(h + b * next + p), at(mine + b * next + p)); });
      const float along = sum_over(batch, l.out, [&](int b, int p) { return where_positive(at(h + b * next + p), at(mine + b * next + p)) * at(picked + b * next + p); });
      const float scale = row[l.scale + c], sign = scale < 0.0f ? -1.0f : 1.0f, rate = l.rate[c];
      const float scale_grad = rate * (along - sign * l.mean[c] * shift_grad), factor = scale * sign * rate;
      const float slope = factor * rate * scale_grad / -count, offset = factor * shift_grad / -count - slope * sign * l.mean[c];
      if (grad) grad[l.scale + c] = sign * scale_grad, grad[l.shift + c] = shift_grad;
      unpool(l.y + c * l.wide.plane(), l.wide, sign, slope, offset, factor, mine, picked, h, l.window, l.out, batch);
    }
    const Kernel weight = kernel_of(row + l.weight, l.in.channels, l.kernel);
    if (grad) kernel_gradient(l.y, l.wide, l.input, l.in, l.kernel, batch.blocks, grad + l.weight, weight.row, weight.column, sums);
    if (passes) convolve(l.y, l.wide, turned(weight), nullptr, false, g, l.in, batch.blocks);
  }

  // ---- A host ----------------------------------------------------------------------------------

  // The seed of a slot as the trunk uses it, or as the branch of the slot ``switched`` does.
  bool seed_of(int64_t host, int s, int switched, Seed* seed) const {
    const int64_t place = host * task.slots + s, stage = task.stage[place];
    *seed = {task.blueprint[place], task.seeds[s] + host * task.seed_row[s], is_attached(stage) ? task.alpha[place] : 0.0f};
    if (s == switched) seed->gate = stage == TRAINING ? 1.0f : 0.0f;
    return seed->gate != 0.0f;
  }
  // The trunk (from is -1), or a branch from the slot ``from`` on, whose h is there.
  void forward(int64_t host, int from, const Batch& batch, bool training) {
    const float* row = task.host + host * task.row;
    for (int s = from < 0 ? 0 : from; s < task.slots; s++) {
      Level& l = level[s];
      if (s != from) {
        const int64_t c = host * l.out.channels;
        const bool runs = !training || from < 0;  // branches leave the running statistics alone
        run_block(l, row, s ? level[s - 1].output : image, batch, task.used[host * task.slots + s], runs ? task.means[s] + c : nullptr, runs ? task.variances[s] + c : nullptr, training);
      }
      l.output = l.h;
      Seed seed;
      if (seed_of(host, s, from, &seed)) grow(l, seed, batch);
    }
    classify(row, level[task.slots - 1].output, batch);
  }
  void backward(int64_t host, int from, const Batch& batch) {
    const float* row = task.host + host * task.row;
    float* grad = from < 0 ? host_grad : nullptr;
    backward_head(row, grad, batch);
    for (int s = (int)task.slots - 1; s >= greatest(0, from); s--) {
      Seed seed;
      const bool learns = from < 0 || s == from;
      if (seed_of(host, s, from, &seed)) backward_seed(level[s], seed, learns ? seed_grad[s] : nullptr, batch, s != from);
      if (s != from) backward_block(level[s], row, grad, batch, s > 0);
    }
  }
  // Mean loss of the batch; the logits become its gradient.
  float batch_loss(int64_t host, const int64_t* label, const Batch& batch) {
    float total = 0.0f;
    for (int b = 0; b < batch.blocks; b++) {
      float loss[IMAGES];
      int own[IMAGES], answer[IMAGES];
      for (int n = 0; n < IMAGES; n++) own[n] = (int)label[smallest(b * IMAGES + n, batch.images - 1)];
      float* logit = logits + b * Size{(int)task.classes, 1}.floats();
      cross_entropy(logit, task.present + host * task.classes, own, loss, answer);
      for (int n = 0; n < smallest(IMAGES, batch.images - b * IMAGES); n++) total += loss[n];
      const Pixel share = batch.mask(b) * (1.0f / batch.images);
      for (int k = 0; k < task.classes; k++) put(logit + k * IMAGES, at(logit + k * IMAGES) * share);
    }
    return total / batch.images;
  }

  static float square(const float* x, int64_t count) {
    Vector sum = {};
    float rest = 0.0f;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) sum += *(const Vector*)(x + k) * *(const Vector*)(x + k);
    for (; k < count; k++) rest += x[k] * x[k];
    return sum_of(sum) + rest;
  }
  void descend(float* __restrict row, float* __restrict speed, const float* __restrict grad, int64_t count, float norm, float rate) const {
    const float clip = task.max_grad_norm / (norm + 1e-6f), factor = clip > 1.0f ? 1.0f : clip;
    for (int64_t k = 0; k < count; k++) {
      speed[k] = row[k] * task.weight_decay + grad[k] * factor + task.momentum * speed[k];
      row[k] -= rate * speed[k];
    }
  }
  static bool is_finite(float x) { return x - x == 0.0f; }

  void train(int64_t host) {
    const Batch batch((int)task.images);
    const int slots = (int)task.slots;
    const int64_t* stage = task.stage + host * slots;
    float* norm = task.grad_norm + host * slots;
    int64_t count[MOST_SLOTS];
    for (int s = 0; s < slots; s++) {
      const bool live = stage[s] == TRAINING || is_attached(stage[s]);
      count[s] = live ? count_parameters(task.blueprint[host * slots + s], level[s].out.channels) : 0;
    }
    bool sound = true;
    for (int64_t update = 0; update < task.updates; update++) {
      const int64_t first = (host * task.updates + update) * task.images;
      const int64_t *index = task.index + first, *label = task.label + first;
      for (int b = 0; b < batch.blocks; b++)
        gather(task.image, level[0].in, [&](int k) { return index[smallest(b * IMAGES + k, batch.images - 1)]; }, image + b * level[0].in.floats());
      for (int s = 0; s < slots; s++) __builtin_memset(seed_grad[s], 0, count[s] * sizeof(float));
      forward(host, -1, batch, true);
      const float loss = batch_loss(host, label, batch);
      backward(host, -1, batch);
      for (int s = slots - 1; s >= 0; s--) {  // a branch overwrites what comes after its slot
        if (stage[s] != TRAINING) continue;
        forward(host, s, batch, true);
        batch_loss(host, label, batch);
        backward(host, s, batch);
      }
      float joint = square(host_grad, task.row), squares[MOST_SLOTS];
      for (int s = 0; s < slots; s++) {
        squares[s] = square(seed_grad[s], count[s]);
        if (is_attached(stage[s])) joint += squares[s];
        norm[s] = f_sqrt(squares[s]);
      }
      joint = f_sqrt(joint);
      const bool finite = is_finite(loss) && is_finite(joint);
      const float rate = task.learning_rate[host];
      if (finite) descend(task.host + host * task.row, task.host_speed + host * task.row, host_grad, task.row, joint, rate);
      for (int s = 0; s < slots; s++) {
        const bool attached = is_attached(stage[s]);
        const int64_t place = host * task.seed_row[s];
        if (attached ? finite : count[s] && is_finite(norm[s]))
          descend(task.seeds[s] + place, task.seed_speeds[s] + place, seed_grad[s], count[s], attached ? joint : norm[s], rate);
      }
      sound = sound && finite;
    }
    task.finite[host] = sound;
  }

  void measure(int64_t host) {
    const int slots = (int)task.slots;
    const uint8_t* present = task.present + host * task.classes;
    double loss = 0.0;
    int64_t counted = 0, right = 0, gained[MOST_SLOTS] = {};
    for (int64_t first = 0; first < task.images; first += IMAGES) {
      const Batch batch(IMAGES);
      const int count = (int)(task.images - first < IMAGES ? task.images - first : IMAGES);
      int own[IMAGES], answer[IMAGES];
      bool counts[IMAGES];
      float losses[IMAGES];
      for (int n = 0; n < IMAGES; n++) own[n] = (int)task.label[first + smallest(n, count - 1)];
      for (int n = 0; n < IMAGES; n++) counts[n] = n < count && present[own[n]];
      gather(task.image, level[0].in, [&](int k) { return first + smallest(k, count - 1); }, image);
      for (int s = slots; s >= 0; s--) {  // the trunk comes first
        const int64_t stage = s < slots ? task.stage[host * slots + s] : DORMANT;
        if (s < slots && !(task.switches && is_judged(stage))) continue;
        forward(host, s < slots ? s : -1, batch, false);
        cross_entropy(logits, present, own, losses, answer);
        int64_t correct = 0;
        for (int n = 0; n < IMAGES; n++) correct += counts[n] && answer[n] == own[n];
        if (s < slots) {
          gained[s] += stage == TRAINING ? correct : -correct;
          continue;
        }
        for (int n = 0; n < IMAGES; n++) counted += counts[n];
        for (int n = 0; n < IMAGES; n++) loss += counts[n] ? losses[n] : 0.0f;
        right += correct;
      }
    }
    for (int s = 0; s < slots; s++) {
      const int64_t stage = task.stage[host * slots + s];
      const bool judged = task.switches && is_judged(stage);
      const int64_t difference = stage == TRAINING ? gained[s] - right : gained[s] + right;
      task.contribution[host * slots + s] = judged ? (float)difference / counted : 0.0f;
    }
    task.loss[host] = (float)(loss / counted);
    task.accuracy[host] = (float)right / counted;
  }
};

static int blocks_of(const Task& task) { return task.index ? (int)((task.images + IMAGES - 1) / IMAGES) : 1; }

extern "C" int64_t work_bytes(const Task* task) {
  Memory memory = {nullptr, 0};
  Network network(*task, blocks_of(*task), memory);
  return memory.used * sizeof(float);
}

static void job(void* argument, Team*, int me) {
  Task* task = (Task*)argument;
  Memory memory = {(float*)(task->work + me * task->work_bytes), 0};
  Network network(*task, blocks_of(*task), memory);
  int64_t host;
  while ((host = __atomic_fetch_add(&task->next, 1, __ATOMIC_RELAXED)) < task->hosts) {
    if (task->index) network.train(host);
    else network.measure(host);
  }
}
// Train where there is an index, else measure.
extern "C" void run(Task* task, int threads) { run_team(threads, job, task); }
