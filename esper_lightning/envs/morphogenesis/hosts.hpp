// Training and measurement of hosts with their seeds. It follows seeds.hpp.
//
// A thread computes one host after another. The arithmetic of a host depends on nothing else, so it
// rounds alike whatever hosts are beside it, and on any number of threads.

enum Stage { DORMANT, TRAINING, BLENDING, HOLDING, FOSSILIZED, FADING, EMBARGOED };  // of lifecycle.py
INLINE bool is_attached(int64_t stage) { return stage >= BLENDING && stage <= FADING; }
INLINE bool is_judged(int64_t stage) { return stage >= TRAINING && stage <= FADING && stage != FOSSILIZED; }

static const float MOMENTUM = 0.1f;  // of running statistics
enum { MOST_SLOTS = 64, TRUNK = -1 };

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

// A block of the host with the slot after it.
struct Level {
  Size in, wide;                 // before the block, and before its pooling
  int kernel, window;            // sides
  int64_t weight, scale, shift;  // places in the host's row
  const float *input, *output;   // of the block and its slot
  float *y, *picked;             // what the convolution and the pooling found
  float *mean, *rate;            // [C], by which the block normalised
  Slot slot;
  float* seed_grad;
};

// A host, whose memory the hosts of a thread use in turn.
struct Network {
  const Task& task;
  Level level[MOST_SLOTS];
  Size head, pooled_size, logit_size;  // the last activations, and images of one pixel
  int64_t head_weight, head_bias;      // places in the host's row
  float *image, *pooled, *logits, *host_grad;
  Gradients gradients;

  Network(const Task& task, int blocks, Memory& memory) : task(task) {
    Size in = {(int)task.channels, (int)task.side};
    image = memory.take(blocks * in.floats());
    int64_t at = 0, most = 0, work = kernel_work(3);
    for (int s = 0; s < task.slots; s++) {
      Level& l = level[s];
      const int c = (int)task.widths[s];
      l.kernel = (int)task.kernels[s], l.window = (int)task.pools[s];
      l.in = in, l.wide = {c, in.side}, in = l.slot.size = {c, in.side / l.window};
      l.weight = at, l.scale = at + (int64_t)c * l.in.channels * l.kernel * l.kernel;
      l.shift = l.scale + c, at = l.shift + c;
      const int64_t size = blocks * in.floats(), three = 3 * blocks * Size{c, 1}.floats(), room = size > three ? size : three;
      l.y = memory.take(blocks * l.wide.floats()), l.picked = memory.take(size);
      l.slot.h = memory.take(size), l.slot.grown = memory.take(size);
      l.slot.middle = memory.take(room), l.slot.active = memory.take(size);
      l.mean = memory.take(c), l.rate = memory.take(c);
      l.seed_grad = memory.take(task.seed_row[s]);
      if (room > most) most = room;
      if (kernel_work(l.kernel) > work) work = kernel_work(l.kernel);
    }
    head = in, pooled_size = {in.channels, 1}, logit_size = {(int)task.classes, 1};
    head_weight = at, head_bias = at + in.channels * task.classes;
    pooled = memory.take(blocks * pooled_size.floats()), logits = memory.take(blocks * logit_size.floats());
    gradients = {memory.take(most), nullptr, memory.take(most), memory.take(work)};
    host_grad = memory.take(task.row);
  }

  // ---- Forward ---------------------------------------------------------------------------------

  // Batch norm uses the running statistics, or in training those of the batch, which then move the
  // running ones, if there are any.
  void run_block(Level& l, const float* row, const Batch& batch, int64_t used, float* mean, float* variance, bool training) {
    const Size out = l.slot.size;
    convolve(l.input, l.in, kernel_of(row + l.weight, l.in.channels, l.kernel), nullptr, false, l.y, l.wide, batch.blocks);
    for (int c = 0; c < out.channels; c++) {
      const float* y = l.y + c * l.wide.plane();
      const Moments found = training ? moments(y, l.wide, batch) : Moments{mean[c], variance[c]};
      if (training && mean) {
        const float count = (float)batch.images * l.wide.area(), unbiased = count > 1.0f ? count / (count - 1.0f) : 1.0f;
        mean[c] += MOMENTUM * (found.mean - mean[c]);
        variance[c] += MOMENTUM * (found.variance * unbiased - variance[c]);
      }
      const float scale = row[l.scale + c], sign = scale < 0.0f ? -1.0f : 1.0f;
      l.mean[c] = found.mean, l.rate[c] = 1.0f / f_sqrt(found.variance + EPS);
      const float factor = scale * sign * l.rate[c], offset = row[l.shift + c] - factor * sign * found.mean;
      float* h = l.slot.h + c * out.plane();
      pool(y, l.wide, sign, factor, offset, l.window, l.picked + c * out.plane(), h, out, batch.blocks);
      if (c >= used)  // and no gradient comes through the relu
        for (int b = 0; b < batch.blocks; b++) __builtin_memset(h + b * out.floats(), 0, out.plane() * sizeof(float));
    }
  }
  // The seed of a slot as the trunk uses it, or as the branch does that switches the slot.
  bool seed_of(int64_t host, int s, int switched, Seed* seed) const {
    const int64_t place = host * task.slots + s, stage = task.stage[place];
    *seed = {task.blueprint[place], task.seeds[s] + host * task.seed_row[s], is_attached(stage) ? task.alpha[place] : 0.0f};
    if (s == switched) seed->gate = stage == TRAINING ? 1.0f : 0.0f;
    return seed->gate != 0.0f;
  }
  // The logits of the TRUNK, or of the branch that switches the slot ``from``, where h of the trunk
  // is.
  void forward(int64_t host, int from, const Batch& batch, bool training) {
    const float* row = task.host + host * task.row;
    const bool runs = !training || from == TRUNK;  // branches leave the running statistics alone
    for (int s = greatest(0, from); s < task.slots; s++) {
      Level& l = level[s];
      if (s != from) {
        const int64_t c = host * l.slot.size.channels;
        l.input = s ? level[s - 1].output : image;
        run_block(l, row, batch, task.used[host * task.slots + s], runs ? task.means[s] + c : nullptr, runs ? task.variances[s] + c : nullptr, training);
      }
      Seed seed;
      const bool grows = seed_of(host, s, from, &seed);
      if (grows) grow(l.slot, seed, batch.blocks);
      l.output = grows ? l.slot.grown : l.slot.h;
    }
    mean_over_pixels(level[task.slots - 1].output, head, pooled, batch.blocks);
    convolve(pooled, pooled_size, head_kernel(row), row + head_bias, false, logits, logit_size, batch.blocks);
  }
  Kernel head_kernel(const float* row) const { return {row + head_weight, 1, 1, task.classes, 1}; }

  // Cross-entropy of each image of a block, and the class that the host finds. The logits become the
  // gradient of the sum.
  void cross_entropy(float* logit, const uint8_t* present, const int* label, float* loss, int* answer) const {
    float top[IMAGES], total[IMAGES], own[IMAGES];
    for (int n = 0; n < IMAGES; n++) top[n] = -__builtin_inff(), total[n] = own[n] = 0.0f, answer[n] = 0;
    for (int k = 0; k < task.classes; k++) {
      const float* x = logit + k * IMAGES;
      for (int n = 0; n < IMAGES; n++) {
        const bool better = present[k] && (x[n] > top[n] || x[n] != x[n]) && top[n] == top[n];
        top[n] = better ? x[n] : top[n];
        answer[n] = better ? k : answer[n];
        own[n] = label[n] == k ? x[n] : own[n];
      }
    }
    for (int k = 0; k < task.classes; k++) {
      float* x = logit + k * IMAGES;
      for (int n = 0; n < IMAGES; n++) x[n] = present[k] ? f_exp(x[n] - top[n]) : 0.0f;
      for (int n = 0; n < IMAGES; n++) total[n] += x[n];
    }
    for (int n = 0; n < IMAGES; n++) loss[n] = f_log(total[n]) + top[n] - own[n];
    for (int k = 0; k < task.classes; k++) {
      float* x = logit + k * IMAGES;
      for (int n = 0; n < IMAGES; n++) x[n] = x[n] / total[n] - (label[n] == k ? 1.0f : 0.0f);
    }
  }

  // ---- Backward --------------------------------------------------------------------------------

  // From the gradient of the logits to that of the last activations; grad may be null.
  void backward_head(const float* row, float* grad, const Batch& batch) {
    const Kernel weight = head_kernel(row);
    if (grad) {
      kernel_gradient(logits, logit_size, pooled, pooled_size, weight, batch.blocks, grad + head_weight, gradients.sums);
      sum_channels(logits, logit_size, batch, grad + head_bias);
    }
    convolve(logits, logit_size, turned(weight), nullptr, false, gradients.other, pooled_size, batch.blocks);
    spread_over_pixels<false>(gradients.other, head, gradients.g, batch.blocks);
  }
  // From the gradient of the block's output to that of its input, if that is wanted.
  void backward_block(Level& l, const float* row, float* grad, const Batch& batch, bool passes) {
    const Size out = l.slot.size;
    const float count = (float)batch.images * l.wide.area();
    for (int c = 0; c < out.channels; c++) {
      const int64_t plane = c * out.plane();
      const float *g = gradients.g + plane, *h = l.slot.h + plane, *picked = l.picked + plane;
      const auto mine = [&](int64_t place) { return where_positive(at(h + place), at(g + place)); };
      const float shift_grad = sum_over(batch, out, [&](int, int64_t place) { return mine(place); });
      const float along = sum_over(batch, out, [&](int, int64_t place) { return mine(place) * at(picked + place); });
      const float scale = row[l.scale + c], sign = scale < 0.0f ? -1.0f : 1.0f, rate = l.rate[c], mean = sign * l.mean[c];
      const float scale_grad = rate * (along - mean * shift_grad), factor = scale * sign * rate;
      const float slope = factor * rate * scale_grad / -count, offset = factor * shift_grad / -count - slope * mean;
      if (grad) grad[l.scale + c] = sign * scale_grad, grad[l.shift + c] = shift_grad;
      unpool(l.y + c * l.wide.plane(), l.wide, sign, slope, offset, factor, g, picked, h, l.window, out, batch);
    }
    const Kernel weight = kernel_of(row + l.weight, l.in.channels, l.kernel);
    if (grad) kernel_gradient(l.y, l.wide, l.input, l.in, weight, batch.blocks, grad + l.weight, gradients.sums);
    if (passes) convolve(l.y, l.wide, turned(weight), nullptr, false, gradients.g, l.in, batch.blocks);
  }
  // Gradients of the TRUNK with its seeds, or of the seed that a branch switches on.
  void backward(int64_t host, int from, const Batch& batch) {
    const float* row = task.host + host * task.row;
    float* grad = from == TRUNK ? host_grad : nullptr;
    backward_head(row, grad, batch);
    for (int s = (int)task.slots - 1; s >= greatest(0, from); s--) {
      Level& l = level[s];
      Seed seed;
      gradients.seed = from == TRUNK || s == from ? l.seed_grad : nullptr;
      if (seed_of(host, s, from, &seed)) backward_seed(l.slot, seed, gradients, batch, s != from);
      else if (grad && is_attached(task.stage[host * task.slots + s]))  // its share has become 0
        __builtin_memset(l.seed_grad, 0, task.seed_row[s] * sizeof(float));
      if (s != from) backward_block(l, row, grad, batch, s > 0);
    }
  }

  // ---- A host ----------------------------------------------------------------------------------

  // Mean loss of the batch; the logits become its gradient.
  float batch_loss(int64_t host, const int64_t* label, const Batch& batch) {
    float total = 0.0f;
    for (int b = 0; b < batch.blocks; b++) {
      float loss[IMAGES];
      int own[IMAGES], answer[IMAGES];
      for (int n = 0; n < IMAGES; n++) own[n] = (int)label[smallest(b * IMAGES + n, batch.images - 1)];
      float* logit = logits + b * logit_size.floats();
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

  // One step of SGD; returns whether loss and gradients of host and attached seeds are finite.
  bool update(int64_t host, const int64_t* index, const int64_t* label, const Batch& batch) {
    const int slots = (int)task.slots;
    const int64_t *stage = task.stage + host * slots, *blueprint = task.blueprint + host * slots;
    for (int b = 0; b < batch.blocks; b++)
      gather(task.image, level[0].in, [&](int k) { return index[smallest(b * IMAGES + k, batch.images - 1)]; }, image + b * level[0].in.floats());
    forward(host, TRUNK, batch, true);
    const float loss = batch_loss(host, label, batch);
    backward(host, TRUNK, batch);
    for (int s = slots - 1; s >= 0; s--) {  // a branch overwrites what comes after its slot
      if (stage[s] != TRAINING) continue;
      forward(host, s, batch, true);
      batch_loss(host, label, batch);
      backward(host, s, batch);
    }
    int64_t count[MOST_SLOTS];
    float *norm = task.grad_norm + host * slots, joint = square(host_grad, task.row);
    for (int s = 0; s < slots; s++) {
      const bool live = stage[s] == TRAINING || is_attached(stage[s]);
      count[s] = live ? count_parameters(blueprint[s], level[s].slot.size) : 0;
      const float mine = square(level[s].seed_grad, count[s]);
      if (is_attached(stage[s])) joint += mine;
      norm[s] = f_sqrt(mine);
    }
    joint = f_sqrt(joint);
    const bool finite = is_finite(loss) && is_finite(joint);
    const float rate = task.learning_rate[host];
    if (finite) descend(task.host + host * task.row, task.host_speed + host * task.row, host_grad, task.row, joint, rate);
    for (int s = 0; s < slots; s++) {
      const bool attached = is_attached(stage[s]);
      const int64_t place = host * task.seed_row[s];
      if (attached ? finite : is_finite(norm[s]))
        descend(task.seeds[s] + place, task.seed_speeds[s] + place, level[s].seed_grad, count[s], attached ? joint : norm[s], rate);
    }
    return finite;
  }
  void train(int64_t host) {
    const Batch batch((int)task.images);
    bool sound = true;
    for (int64_t step = host * task.updates; step < (host + 1) * task.updates; step++)
      sound &= update(host, task.index + step * task.images, task.label + step * task.images, batch);
    task.finite[host] = sound;
  }

  void measure(int64_t host) {
    const int slots = (int)task.slots;
    const int64_t* stage = task.stage + host * slots;
    const uint8_t* present = task.present + host * task.classes;
    double loss = 0.0;
    int64_t counted = 0, right = 0, switched[MOST_SLOTS] = {};  // images that are classified right
    const Batch batch(IMAGES);
    for (int64_t first = 0; first < task.images; first += IMAGES) {
      const int count = (int)(task.images - first < IMAGES ? task.images - first : IMAGES);
      int own[IMAGES], answer[IMAGES];
      bool counts[IMAGES];
      float losses[IMAGES];
      for (int n = 0; n < IMAGES; n++) {
        own[n] = (int)task.label[first + smallest(n, count - 1)];
        counts[n] = n < count && present[own[n]];
      }
      const auto count_right = [&](int from) {
        forward(host, from, batch, false);
        cross_entropy(logits, present, own, losses, answer);
        int64_t found = 0;
        for (int n = 0; n < IMAGES; n++) found += counts[n] && answer[n] == own[n];
        return found;
      };
      gather(task.image, level[0].in, [&](int k) { return first + smallest(k, count - 1); }, image);
      right += count_right(TRUNK);
      for (int n = 0; n < IMAGES; n++) counted += counts[n], loss += counts[n] ? losses[n] : 0.0f;
      for (int s = slots - 1; s >= 0; s--)
        if (task.switches && is_judged(stage[s])) switched[s] += count_right(s);
    }
    for (int s = 0; s < slots; s++) {
      const bool judged = task.switches && is_judged(stage[s]);
      const float gained = (float)(stage[s] == TRAINING ? switched[s] - right : right - switched[s]);
      task.contribution[host * slots + s] = judged ? gained / counted : 0.0f;
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
