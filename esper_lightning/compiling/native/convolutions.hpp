// What generated code calls for images, channels first: convolutions, their gradients, pooling.
// It follows kernels.hpp.

// ---- Convolutions ------------------------------------------------------------------------------

// A convolution is a product of the weights and of copies of the image that are shifted by the taps
// of the kernel. The copies need not be made: an image is written once as padded planes, one for
// each remainder of a row and of a column divided by the strides, and a tap is then an offset into
// the planes. A row of the result has the width of a plane, and thus a few numbers at its end that
// belong to no pixel.

template <class T> struct Wide;
template <> struct Wide<float> { typedef float type __attribute__((vector_size(LANES * 4), aligned(4), may_alias)); };
template <> struct Wide<double> { typedef double type __attribute__((vector_size(LANES * 4), aligned(8), may_alias)); };
template <class T> using WideVector = typename Wide<T>::type;
template <class T> constexpr int lanes() { return LANES * 4 / (int)sizeof(T); }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

#if defined(__AVX512F__)
enum { TAP_ROWS = 4, TAP_VECTORS = 5, SUM_ROWS = 4, SUM_TAPS = 4 };
#elif defined(__AVX__)
enum { TAP_ROWS = 4, TAP_VECTORS = 3, SUM_ROWS = 4, SUM_TAPS = 3 };
#else
enum { TAP_ROWS = 4, TAP_VECTORS = 5, SUM_ROWS = 4, SUM_TAPS = 4 };
#endif

// Keeps a number in a register, where a compiler would read it from memory for every use.
#if defined(__AVX512F__)
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#elif defined(__x86_64__)
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define IN_REGISTER(x) __asm__("" : "+w"(x))
#else
#define IN_REGISTER(x)
#endif

template <class T> INLINE WideVector<T> wide_at(const T* from) { return *(const WideVector<T>*)from; }
template <class T> INLINE T sum_of(WideVector<T> v) {
  enum { N = LANES * 4 / sizeof(T) };
  T x[N];
  __builtin_memcpy(x, &v, sizeof x);
  UNROLL
  for (int n = N / 2; n > 0; n /= 2)
    UNROLL
    for (int k = 0; k < n; k++) x[k] += x[k + n];
  return x[0];
}

// to[i][q] = sum over k of A[i][k] * X[offset[k] + q].
template <class T, int ROWS, int VECTORS>
INLINE void taps_block(const T* __restrict A, int depth, const T* __restrict X, const int32_t* __restrict offset, T* __restrict to, int width) {
  CONTRACT
  enum { N = LANES * 4 / sizeof(T) };
  WideVector<T> c[ROWS][VECTORS];
  UNROLL
  for (int i = 0; i < ROWS; i++)
    UNROLL
    for (int j = 0; j < VECTORS; j++) c[i][j] = WideVector<T>{};
  for (int k = 0; k < depth; k++) {
    const T* from = X + offset[k];
    WideVector<T> b[VECTORS];
    UNROLL
    for (int j = 0; j < VECTORS; j++) b[j] = wide_at(from + j * N);
    UNROLL
    for (int i = 0; i < ROWS; i++) {
      const T a = A[(int64_t)i * depth + k];
      UNROLL
      for (int j = 0; j < VECTORS; j++) c[i][j] += a * b[j];
    }
  }
  UNROLL
  for (int i = 0; i < ROWS; i++)
    UNROLL
    for (int j = 0; j < VECTORS; j++) *(WideVector<T>*)(to + (int64_t)i * width + j * N) = c[i][j];
}
template <class T, int ROWS, int VECTORS>
CONTRACTED NOINLINE static void taps_panel(const T* __restrict A, int depth, const T* __restrict X, const int32_t* __restrict offset, T* __restrict to) {
  enum { N = LANES * 4 / sizeof(T), PANELS = (VECTORS + TAP_VECTORS - 1) / TAP_VECTORS };
  enum { FEW = VECTORS / PANELS, MORE = VECTORS % PANELS };  // vectors of a panel; panels of one more
  int at = 0;
  if constexpr (MORE > 0)
    for (int p = 0; p < MORE; p++, at += (FEW + 1) * N)
      taps_block<T, ROWS, FEW + 1>(A, depth, X + at, offset, to + at, VECTORS * N);
  for (int p = MORE; p < PANELS; p++, at += FEW * N)
    taps_block<T, ROWS, FEW>(A, depth, X + at, offset, to + at, VECTORS * N);
}
// All rows of A, each of which is passed to put(row, numbers). Memory ``to`` is for TAP_ROWS rows.
template <class T, int VECTORS, class Put>
INLINE void taps(const T* A, int rows, int depth, const T* X, const int32_t* offset, T* to, Put put) {
  enum { WIDTH = VECTORS * (LANES * 4 / sizeof(T)) };
  int i = 0;
  for (; i + TAP_ROWS <= rows; i += TAP_ROWS) {
    taps_panel<T, TAP_ROWS, VECTORS>(A + (int64_t)i * depth, depth, X, offset, to);
    for (int j = 0; j < TAP_ROWS; j++) put(i + j, to + j * WIDTH);
  }
  for (; i < rows; i++) {
    taps_panel<T, 1, VECTORS>(A + (int64_t)i * depth, depth, X, offset, to);
    put(i, to);
  }
}

// sums[i][k] += sum over images n and q of G[i][n][q] * X[n][offset[k] + q].
template <class T, int ROWS, int TAPS, int VECTORS>
INLINE void sums_block(const T* __restrict G, int64_t row_g, const T* __restrict X, int64_t next_x, int images, const int32_t* __restrict offset, T* __restrict sums, int depth) {
  CONTRACT
  enum { N = LANES * 4 / sizeof(T) };
  WideVector<T> c[ROWS][TAPS];
  UNROLL
  for (int i = 0; i < ROWS; i++)
    UNROLL
    for (int k = 0; k < TAPS; k++) c[i][k] = WideVector<T>{};
  for (int n = 0; n < images; n++, G += VECTORS * N, X += next_x) {
    const T* from[TAPS];
    UNROLL
    for (int k = 0; k < TAPS; k++) from[k] = X + offset[k];
    for (int q = 0; q < VECTORS * N; q += N) {
      WideVector<T> x[TAPS];
      UNROLL
      for (int k = 0; k < TAPS; k++) x[k] = wide_at(from[k] + q);
      UNROLL
      for (int i = 0; i < ROWS; i++) {
        WideVector<T> g = wide_at(G + i * row_g + q);
        IN_REGISTER(g);
        UNROLL
        for (int k = 0; k < TAPS; k++) c[i][k] += g * x[k];
      }
    }
  }
  UNROLL
  for (int i = 0; i < ROWS; i++)
    UNROLL
    for (int k = 0; k < TAPS; k++) sums[(int64_t)i * depth + k] += sum_of<T>(c[i][k]);
}
template <class T, int ROWS, int VECTORS>
CONTRACTED NOINLINE static void sums_rows(const T* G, int64_t row_g, const T* X, int64_t next_x, int images, const int32_t* offset, T* sums, int depth) {
  int k = 0;
  for (; k + SUM_TAPS <= depth; k += SUM_TAPS)
    sums_block<T, ROWS, SUM_TAPS, VECTORS>(G, row_g, X, next_x, images, offset + k, sums + k, depth);
  for (; k < depth; k++) sums_block<T, ROWS, 1, VECTORS>(G, row_g, X, next_x, images, offset + k, sums + k, depth);
}

// An image [C][H][W] of the strides XC, XH, XW as planes [C][SH][SW][HQ][WQ]: pixel (h, w) of the
// planes (rh, rw) is pixel (SH * h + rh - PH, SW * w + rw - PW) of the image, or 0 outside of it.
template <class T, int C, int H, int W, int64_t XC, int64_t XH, int64_t XW, int SH, int SW, int PH, int PW, int HQ, int WQ>
NOINLINE static void planes(const T* __restrict x, T* __restrict X) {
  constexpr int BEGIN = smaller(WQ, larger(0, (PW + SW - 1) / SW));  // where all of SW pixels lie inside
  constexpr int END = larger(BEGIN, smaller(WQ, W + PW < SW ? 0 : (W + PW - SW) / SW + 1));
  for (int c = 0; c < C; c++)
    for (int rh = 0; rh < SH; rh++)
      for (int hq = 0; hq < HQ; hq++) {
        T* to = X + (((int64_t)c * SH + rh) * SW * HQ + hq) * WQ;
        const int h = hq * SH + rh - PH;
        if (h < 0 || h >= H) {
          for (int rw = 0; rw < SW; rw++)
            for (int wq = 0; wq < WQ; wq++) to[rw * HQ * WQ + wq] = 0;
          continue;
        }
        const T* row = x + c * XC + h * XH;
        const auto edge = [&](int wq) {
          for (int rw = 0; rw < SW; rw++) {
            const int w = wq * SW + rw - PW;
            to[rw * HQ * WQ + wq] = w >= 0 && w < W ? row[w * XW] : (T)0;
          }
        };
        for (int wq = 0; wq < BEGIN; wq++) edge(wq);
        for (int wq = BEGIN; wq < END; wq++)
          UNROLL
          for (int rw = 0; rw < SW; rw++) to[rw * HQ * WQ + wq] = row[(wq * SW + rw - PW) * XW];
        for (int wq = END; wq < WQ; wq++) edge(wq);
      }
}

// Images [C][H][W], weights [O][C / GROUPS][KH][KW]. S strides, P padding, D dilation.
template <class T, int C, int H, int W, int O, int KH, int KW, int SH, int SW, int PH, int PW, int DH, int DW, int GROUPS>
struct Convolution {
  enum { N = LANES * 4 / sizeof(T) };
  enum { OH = (H + 2 * PH - DH * (KH - 1) - 1) / SH + 1, OW = (W + 2 * PW - DW * (KW - 1) - 1) / SW + 1 };
  enum { CG = C / GROUPS, OG = O / GROUPS, DEPTH = CG * KH * KW };
  enum { HQ = OH + (KH - 1) * DH / SH, WQ = OW + (KW - 1) * DW / SW };  // size of a plane
  enum { VECTORS = ((OH - 1) * WQ + OW + N - 1) / N, WIDTH = VECTORS * N };
  enum { PLANES = C * SH * SW * HQ * WQ + WIDTH };  // with zeros behind the last plane

  static void write_offsets(int32_t* offset) {
    for (int c = 0; c < CG; c++)
      for (int kh = 0; kh < KH; kh++)
        for (int kw = 0; kw < KW; kw++) {
          const int plane = (c * SH + kh * DH % SH) * SW + kw * DW % SW;
          *offset++ = (plane * HQ + kh * DH / SH) * WQ + kw * DW / SW;
        }
  }
  template <int64_t XC, int64_t XH, int64_t XW> static void write_planes(const T* x, T* X) {
    planes<T, C, H, W, XC, XH, XW, SH, SW, PH, PW, HQ, WQ>(x, X);
    for (int k = 0; k < WIDTH; k++) X[PLANES - WIDTH + k] = 0;
  }

  // Images first to end of out[n][O][OH][OW]; bias may be null.
  template <int64_t XN, int64_t XC, int64_t XH, int64_t XW, int64_t WORK>
  NOINLINE static void forward(const T* __restrict x, const T* __restrict weight, const T* __restrict bias, T* __restrict out, T* __restrict work, int64_t first, int64_t end) {
    static_assert(PLANES + TAP_ROWS * WIDTH <= WORK);
    int32_t offset[DEPTH];
    write_offsets(offset);
    T *X = work, *wide = work + PLANES;
    for (int64_t n = first; n < end; n++) {
      write_planes<XC, XH, XW>(x + n * XN, X);
      for (int g = 0; g < GROUPS; g++)
        taps<T, VECTORS>(
            weight + (int64_t)g * OG * DEPTH, OG, DEPTH, X + (int64_t)g * CG * SH * SW * HQ * WQ, offset, wide, [&](int o, const T* __restrict from) {
              T* __restrict to = out + (n * O + g * OG + o) * (OH * OW);
              const T b = bias ? bias[g * OG + o] : (T)0;
              for (int h = 0; h < OH; h++)
                for (int w = 0; w < OW; w++) to[h * OW + w] = from[h * WQ + w] + b;
            });
    }
  }

  // Rows first to end of the gradient [O][C / GROUPS][KH][KW] of the weights, BATCH images at a time.
  template <int64_t XN, int64_t XC, int64_t XH, int64_t XW, int IMAGES, int BATCH, int64_t WORK>
  NOINLINE static void of_weight(const T* __restrict x, const T* __restrict gradient, T* __restrict out, T* __restrict work, int64_t first, int64_t end) {
    static_assert((int64_t)BATCH * PLANES + (int64_t)BATCH * O * WIDTH <= WORK);
    int32_t offset[DEPTH];
    write_offsets(offset);
    T *X = work, *G = work + (int64_t)BATCH * PLANES;
    for (int64_t k = first * DEPTH; k < end * DEPTH; k++) out[k] = 0;
    for (int64_t k = 0; k < (int64_t)BATCH * O * WIDTH; k++) G[k] = 0;
    for (int64_t batch = 0; batch < IMAGES; batch += BATCH) {
      const int images = IMAGES - batch < BATCH ? IMAGES - batch : BATCH;
      for (int n = 0; n < images; n++) {
        write_planes<XC, XH, XW>(x + (batch + n) * XN, X + (int64_t)n * PLANES);
        for (int64_t o = first; o < end; o++) {
          const T* __restrict from = gradient + ((batch + n) * O + o) * (OH * OW);
          T* __restrict to = G + (o * BATCH + n) * WIDTH;
          for (int h = 0; h < OH; h++)
            for (int w = 0; w < OW; w++) to[h * WQ + w] = from[h * OW + w];
        }
      }
      for (int64_t o = first, some; o < end; o += some) {
        const int64_t g = o / OG, rest = ((g + 1) * OG < end ? (g + 1) * OG : end) - o;
        const T* of_group = X + g * CG * SH * SW * HQ * WQ;
        some = rest < SUM_ROWS ? 1 : SUM_ROWS;
        if (some == 1) sums_rows<T, 1, VECTORS>(G + o * BATCH * WIDTH, BATCH * WIDTH, of_group, PLANES, images, offset, out + o * DEPTH, DEPTH);
        else sums_rows<T, SUM_ROWS, VECTORS>(G + o * BATCH * WIDTH, BATCH * WIDTH, of_group, PLANES, images, offset, out + o * DEPTH, DEPTH);
      }
    }
  }

  // The gradient of the input is a convolution of stride 1 for each remainder of a row and of a
  // column divided by the strides, with the taps that reach such rows and columns.
  enum { JH = (KH - 1) * DH / SH, JW = (KW - 1) * DW / SW };  // largest shift
  enum { TH = (H - 1 + PH) / SH - PH / SH + 1, TW = (W - 1 + PW) / SW - PW / SW + 1 };
  enum { HG = TH + JH, WG = TW + JW };
  enum { IN_VECTORS = ((TH - 1) * WG + TW + N - 1) / N, IN_WIDTH = IN_VECTORS * N };
  enum { IN_PLANES = O * HG * WG + IN_WIDTH, WEIGHTS = O * DEPTH };

  // Images first to end of the gradient [n][C][H][W] of the input.
  template <int64_t WORK>
  NOINLINE static void of_input(const T* __restrict gradient, const T* __restrict weight, T* __restrict out, T* __restrict work, int64_t first, int64_t end) {
    static_assert(WEIGHTS + IN_PLANES + TAP_ROWS * IN_WIDTH <= WORK);
    int32_t offset[OG * KH * KW];
    T *packed = work, *G = work + WEIGHTS, *wide = G + IN_PLANES;
    int depth[SH * SW] = {}, at = 0;
    for (int phase = 0; phase < SH * SW; phase++) {
      const int begin = at;
      for (int o = 0; o < OG; o++)
        for (int kh = 0; kh < KH; kh++)
          for (int kw = 0; kw < KW; kw++) {
            if (kh * DH % SH != phase / SW || kw * DW % SW != phase % SW) continue;
            offset[at++] = (o * HG + JH - kh * DH / SH) * WG + JW - kw * DW / SW;
          }
      depth[phase] = at - begin;
      T* to = packed + (int64_t)begin * C;
      for (int c = 0; c < C; c++)
        for (int o = 0; o < OG; o++)
          for (int kh = 0; kh < KH; kh++)
            for (int kw = 0; kw < KW; kw++) {
              if (kh * DH % SH != phase / SW || kw * DW % SW != phase % SW) continue;
              *to++ = weight[(((int64_t)(c / CG * OG + o) * CG + c % CG) * KH + kh) * KW + kw];
            }
    }
    for (int64_t n = first; n < end; n++) {
      planes<T, O, OH, OW, OH * OW, OW, 1, 1, 1, JH - PH / SH, JW - PW / SW, HG, WG>(gradient + n * (O * OH * OW), G);
      for (int k = 0; k < IN_WIDTH; k++) G[IN_PLANES - IN_WIDTH + k] = 0;
      for (int phase = 0, begin = 0; phase < SH * SW; begin += depth[phase++]) {
        const int h0 = PH / SH * SH + phase / SW - PH, w0 = PW / SW * SW + phase % SW - PW;  // of t = 0
        const int t0 = w0 < 0 ? 1 : 0, t1 = smaller(TW, w0 >= W ? 0 : (W - 1 - w0) / SW + 1);
        for (int g = 0; g < GROUPS; g++)
          taps<T, IN_VECTORS>(
              packed + (int64_t)begin * C + (int64_t)g * CG * depth[phase], CG, depth[phase], G + (int64_t)g * OG * HG * WG, offset + begin, wide, [&](int c, const T* __restrict from) {
                T* __restrict to = out + (n * C + g * CG + c) * (H * W);
                for (int th = 0; th < TH; th++) {
                  const int h = h0 + th * SH;
                  if (h < 0 || h >= H) continue;
                  for (int t = t0; t < t1; t++) to[h * W + w0 + t * SW] = from[th * WG + t];
                }
              });
      }
    }
  }
};

// ---- Pooling -----------------------------------------------------------------------------------

// Planes first to end of the largest numbers of windows, and their places, as torch chooses them.
template <class T, int H, int W, int OH, int OW, int KH, int KW, int SH, int SW, int PH, int PW, int DH, int DW>
NOINLINE static void largest(const T* __restrict x, T* __restrict out, int64_t* __restrict places, int64_t first, int64_t end) {
  for (int64_t n = first; n < end; n++)
    for (int oh = 0; oh < OH; oh++) {
      const T* image = x + n * (H * W);
      T most[OW];
      int32_t place[OW];
      for (int k = 0; k < OW; k++) most[k] = -(T)__builtin_inff(), place[k] = -1;
      for (int kh = 0; kh < KH; kh++) {
        const int h = oh * SH - PH + kh * DH;
        if (h < 0 || h >= H) continue;
        for (int kw = 0; kw < KW; kw++) {
          const int w = kw * DW - PW;  // of the first window
          const int k0 = w < 0 ? (-w + SW - 1) / SW : 0, k1 = w >= W ? 0 : smaller(OW, (W - 1 - w) / SW + 1);
          for (int k = k0; k < k1; k++) {
            const T v = image[h * W + w + k * SW];
            const bool better = v > most[k] || v != v || place[k] < 0;
            most[k] = better ? v : most[k];
            place[k] = better ? h * W + w + k * SW : place[k];
          }
        }
      }
      for (int k = 0; k < OW; k++) {
        out[(n * OH + oh) * OW + k] = most[k];
        places[(n * OH + oh) * OW + k] = place[k];
      }
    }
}
// Planes first to end: numbers added at places of planes of SIZE pixels.
template <class T, int SIZE, int COUNT>
NOINLINE static void add_at(const T* __restrict gradient, const int64_t* __restrict places, T* __restrict out, Team* team, int64_t first, int64_t end) {
  bool bad = false;
  for (int64_t n = first; n < end; n++) {
    T* to = out + n * SIZE;
    for (int k = 0; k < SIZE; k++) to[k] = 0;
    for (int k = 0; k < COUNT; k++) {
      const int64_t at = places[n * COUNT + k];
      const bool inside = (uint64_t)at < (uint64_t)SIZE;
      bad |= !inside;
      if (inside) to[at] += gradient[n * COUNT + k];
    }
  }
  note_error(bad, INDEX_OUTSIDE, team);
}

struct Window { int32_t first, end, size; };  // of an axis; the sum is divided by both sizes

// Planes first to end of the means of windows.
template <class T, int H, int W, int OH, int OW>
NOINLINE static void means(const T* __restrict x, T* __restrict out, const Window* rows, const Window* columns, int64_t first, int64_t end) {
  for (int64_t n = first; n < end; n++)
    for (int oh = 0; oh < OH; oh++)
      for (int ow = 0; ow < OW; ow++) {
        const Window a = rows[oh], b = columns[ow];
        T sum = 0;
        for (int h = a.first; h < a.end; h++)
          for (int w = b.first; w < b.end; w++) sum += x[(n * H + h) * W + w];
        out[(n * OH + oh) * OW + ow] = a.first < a.end && b.first < b.end ? sum / (T)((int64_t)a.size * b.size) : (T)0;
      }
}
// The gradient of ``means``.
template <class T, int H, int W, int OH, int OW>
NOINLINE static void of_means(const T* __restrict gradient, T* __restrict out, const Window* rows, const Window* columns, int64_t first, int64_t end) {
  for (int64_t n = first; n < end; n++) {
    for (int k = 0; k < H * W; k++) out[n * (H * W) + k] = 0;
    for (int oh = 0; oh < OH; oh++)
      for (int ow = 0; ow < OW; ow++) {
        const Window a = rows[oh], b = columns[ow];
        const T g = gradient[(n * OH + oh) * OW + ow] / (T)((int64_t)a.size * b.size);
        for (int h = a.first; h < a.end; h++)
          for (int w = b.first; w < b.end; w++) out[(n * H + h) * W + w] += g;
      }
  }
}
