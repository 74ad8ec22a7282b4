// What generated code calls: a team of threads, functions of numbers, products of matrices.
// No header of torch is needed, so a file compiles in about a second.
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline, unused))
#define UNUSED __attribute__((unused))
// Functions of their own compile much faster than one that holds them all.
#define NOINLINE __attribute__((noinline, unused))
// Products of matrices may round ``a * b + c`` once. What users write may not: torch rounds each
// operation, and ``x * x - x * x`` is to be 0.
#if defined(__clang__)
#define CONTRACTED
#define CONTRACT _Pragma("clang fp contract(fast)")
#else
#define CONTRACTED __attribute__((optimize("fp-contract=fast")))
#define CONTRACT
#endif

// ---- A team of threads -------------------------------------------------------------------------

enum Error { INDEX_OUTSIDE = 1, DIVISION_BY_ZERO };  // as in program.py

struct Team {
  int size;   // number of threads
  int error;  // the first one of the call; 0 if there is none
  int waiting;
  unsigned round;
  pthread_mutex_t lock;
  pthread_cond_t changed;
};

INLINE void pause_a_little() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Wait for all threads of the team: shortly by looking, then asleep, since other work may need the
// processor.
UNUSED static void wait_for_all(Team* team, int) {
  if (team->size == 1) return;
  const unsigned round = __atomic_load_n(&team->round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&team->waiting, 1, __ATOMIC_ACQ_REL) == team->size) {
    __atomic_store_n(&team->waiting, 0, __ATOMIC_RELAXED);
    pthread_mutex_lock(&team->lock);
    __atomic_store_n(&team->round, round + 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->lock);
    return;
  }
  for (int k = 0; k < 400; k++) {
    if (__atomic_load_n(&team->round, __ATOMIC_ACQUIRE) != round) return;
    pause_a_little();
  }
  pthread_mutex_lock(&team->lock);
  while (__atomic_load_n(&team->round, __ATOMIC_ACQUIRE) == round)
    pthread_cond_wait(&team->changed, &team->lock);
  pthread_mutex_unlock(&team->lock);
}

typedef void (*Work)(void* argument, Team* team, int me);
struct Member { Team* team; Work work; void* argument; int number; pthread_t thread; };

UNUSED static void* member_main(void* pointer) {
  Member* member = (Member*)pointer;
  Team* team = member->team;
  pthread_mutex_lock(&team->lock);  // until it is known how many threads there are
  while (team->size == 0) pthread_cond_wait(&team->changed, &team->lock);
  pthread_mutex_unlock(&team->lock);
  member->work(member->argument, team, member->number);
  return nullptr;
}

// Run a function on several threads, and return the first error, or 0.
// Where threads cannot be started, fewer do the same.
UNUSED static int run_team(int threads, Work work, void* argument) {
  enum { most = 256 };
  Team team = {};
  pthread_mutex_init(&team.lock, nullptr);
  pthread_cond_init(&team.changed, nullptr);
  Member members[most];
  int started = 0;
  if (threads > most) threads = most;
  if (threads > 1) {
    sigset_t all, before;  // signals are the business of the thread that calls
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; started < threads - 1; started++) {
      Member* member = &members[started];
      *member = {&team, work, argument, started + 1, {}};
      if (pthread_create(&member->thread, nullptr, member_main, member)) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  pthread_mutex_lock(&team.lock);
  team.size = started + 1;
  pthread_cond_broadcast(&team.changed);
  pthread_mutex_unlock(&team.lock);
  work(argument, &team, 0);
  for (int k = 0; k < started; k++) pthread_join(members[k].thread, nullptr);
  pthread_cond_destroy(&team.changed);
  pthread_mutex_destroy(&team.lock);
  return team.error;
}

// First of the rows that a thread computes.
INLINE int64_t share(int64_t rows, int64_t granularity, int64_t size, int64_t me) {
  const int64_t blocks = (rows + granularity - 1) / granularity;
  const int64_t first = blocks * me / size * granularity;
  return first < rows ? first : rows;
}

// ---- Functions of numbers ----------------------------------------------------------------------

// a * b + c, rounded once where the processor can: no compiler may do so on its own (``CONTRACTED``).
INLINE float f_fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
// A number as an integer. Compilers that ignore traps take ``(float)(int)x`` for ``trunc(x)``, which
// may be -0.0 or larger than any integer.
template <class To, class From> INLINE To f_whole(From x) {
  To whole = (To)x;
#if defined(__clang__)
  return whole;
#elif __GNUC__ >= 12
  return __builtin_assoc_barrier(whole);
#else  // not as vectors
  __asm__("" : "+r"(whole));
  return whole;
#endif
}

INLINE int32_t bits_of(float x) { int32_t k; __builtin_memcpy(&k, &x, 4); return k; }
INLINE float from_bits(int32_t k) { float x; __builtin_memcpy(&x, &k, 4); return x; }

INLINE float f_exp(float x) {  // Cephes; 2 ulp
  const float z = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float n = __builtin_rintf(z * 1.44269504088896341f);
  const float r = f_fma(n, 2.12194440e-4f, f_fma(n, -0.693359375f, z));
  float p = 1.9875691500e-4f;
  p = f_fma(p, r, 1.3981999507e-3f);
  p = f_fma(p, r, 8.3334519073e-3f);
  p = f_fma(p, r, 4.1665795894e-2f);
  p = f_fma(p, r, 1.6666665459e-1f);
  p = f_fma(p, r, 5.0000001201e-1f);
  p = f_fma(p, r * r, r) + 1.0f;
  const int32_t k = (int32_t)n, half = k >> 1;  // in two steps, for results that are denormal
  return p * from_bits((half + 127) << 23) * from_bits((k - half + 127) << 23);
}
INLINE double f_exp(double x) { return __builtin_exp(x); }

INLINE float f_log(float x) {  // Cephes; 2 ulp
  const bool tiny = x < 1.17549435e-38f;
  const int32_t bits = bits_of(tiny ? x * 8388608.0f : x);
  float m = from_bits((bits & 0x007fffff) | 0x3f000000);
  int32_t e = ((bits >> 23) & 255) - (tiny ? 149 : 126);
  const bool low = m < 0.707106781186547524f;
  e -= low;
  m = (low ? m + m : m) - 1.0f;
  const float z = m * m, k = (float)e;
  float p = 7.0376836292e-2f;
  p = f_fma(p, m, -1.1514610310e-1f);
  p = f_fma(p, m, 1.1676998740e-1f);
  p = f_fma(p, m, -1.2420140846e-1f);
  p = f_fma(p, m, 1.4249322787e-1f);
  p = f_fma(p, m, -1.6668057665e-1f);
  p = f_fma(p, m, 2.0000714765e-1f);
  p = f_fma(p, m, -2.4999993993e-1f);
  p = f_fma(p, m, 3.3333331174e-1f);
  const float y = f_fma(-0.5f, z, f_fma(-2.12194440e-4f, k, m * z * p));
  const float r = f_fma(0.693359375f, k, m + y);
  return x == 0.0f ? -__builtin_inff() : (x < 0.0f ? __builtin_nanf("") : (x < __builtin_inff() ? r : x));
}
INLINE double f_log(double x) { return __builtin_log(x); }

INLINE float f_log1p(float x) {  // Kahan
  const float u = 1.0f + x;
  return u == 1.0f || u == __builtin_inff() ? x : f_log(u) * (x / (u - 1.0f));
}
INLINE double f_log1p(double x) { return __builtin_log1p(x); }

INLINE float f_expm1(float x) {  // Kahan
  const float u = f_exp(x);
  const float r = (u - 1.0f) * (x / f_log(u));
  return u == 1.0f ? x : (u == __builtin_inff() ? u : (u - 1.0f == -1.0f ? -1.0f : r));
}
INLINE double f_expm1(double x) { return __builtin_expm1(x); }

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define TANH_IS_1 7.99881172180175781f
#else
#define TANH_IS_1 7.90531110763549805f
#endif
INLINE float f_tanh(float x) {  // Eigen's rational function; 4 ulp
  const float z = x < -TANH_IS_1 ? -TANH_IS_1 : (x > TANH_IS_1 ? TANH_IS_1 : x);
  const float s = z * z;
  float p = -2.76076847742355e-16f;
  p = f_fma(p, s, 2.00018790482477e-13f);
  p = f_fma(p, s, -8.60467152213735e-11f);
  p = f_fma(p, s, 5.12229709037114e-08f);
  p = f_fma(p, s, 1.48572235717979e-05f);
  p = f_fma(p, s, 6.37261928875436e-04f);
  p = f_fma(p, s, 4.89352455891786e-03f);
  float q = 1.19825839466702e-06f;
  q = f_fma(q, s, 1.18534705686654e-04f);
  q = f_fma(q, s, 2.26843463243900e-03f);
  q = f_fma(q, s, 4.89352518554385e-03f);
  return z * (p / q);
}
INLINE double f_tanh(double x) { return __builtin_tanh(x); }

INLINE float f_erf(float x) {  // a polynomial, and for larger numbers 1 - exp(a polynomial); 2 ulp
  const float t = __builtin_fabsf(x) < 10.0f ? __builtin_fabsf(x) : 10.0f, s = t * t;
  float p = f_fma(-1.72853470e-5f, t, 3.83197126e-4f);
  p = f_fma(p, s, f_fma(-3.88396438e-3f, t, 2.42546219e-2f));
  p = f_fma(p, t, -1.06777877e-1f);
  p = f_fma(p, t, -6.34846687e-1f);
  p = f_fma(p, t, -1.28717512e-1f);
  p = 1.0f - f_exp(f_fma(p, t, -t));
  float q = -5.96761703e-4f;
  q = f_fma(q, s, 4.99119423e-3f);
  q = f_fma(q, s, -2.67681349e-2f);
  q = f_fma(q, s, 1.12819925e-1f);
  q = f_fma(q, s, -3.76125336e-1f);
  q = f_fma(q, s, 1.28379166e-1f);
  q = f_fma(q, x, x);
  return x != x ? x : t > 0.927734375f ? __builtin_copysignf(p, x) : q;
}
INLINE double f_erf(double x) { return __builtin_erf(x); }

#define BY_LIBRARY(name) \
  INLINE float f_##name(float x) { return __builtin_##name##f(x); } \
  INLINE double f_##name(double x) { return __builtin_##name(x); }
BY_LIBRARY(sin) BY_LIBRARY(cos) BY_LIBRARY(tan) BY_LIBRARY(asin) BY_LIBRARY(acos) BY_LIBRARY(atan)
BY_LIBRARY(sinh) BY_LIBRARY(cosh)
INLINE float f_pow(float x, float y) { return __builtin_powf(x, y); }
INLINE double f_pow(double x, double y) { return __builtin_pow(x, y); }
INLINE float f_atan2(float y, float x) { return __builtin_atan2f(y, x); }
INLINE double f_atan2(double y, double x) { return __builtin_atan2(y, x); }
template <class T> INLINE T f_fmod(T x, T y) {
  return (T)(sizeof(T) == sizeof(float) ? __builtin_fmodf(x, y) : __builtin_fmod(x, y));
}
INLINE float f_sqrt(float x) { return __builtin_sqrtf(x); }
INLINE double f_sqrt(double x) { return __builtin_sqrt(x); }
INLINE float f_floor(float x) { return __builtin_floorf(x); }
INLINE double f_floor(double x) { return __builtin_floor(x); }
INLINE float f_ceil(float x) { return __builtin_ceilf(x); }
INLINE double f_ceil(double x) { return __builtin_ceil(x); }
INLINE float f_trunc(float x) { return __builtin_truncf(x); }
INLINE double f_trunc(double x) { return __builtin_trunc(x); }
INLINE float f_round(float x) { return __builtin_rintf(x); }
INLINE double f_round(double x) { return __builtin_rint(x); }
INLINE float f_abs(float x) { return __builtin_fabsf(x); }
INLINE double f_abs(double x) { return __builtin_fabs(x); }
template <class T> INLINE T f_abs(T x) { return x < 0 ? (T)-x : x; }

// Both sides are computed first. Where a compiler may skip the load of one side, gcc 12 reads wrong
// numbers in some nests of short loops.
template <class T> INLINE T f_where(bool condition, T x, T y) { return condition ? x : y; }
// NaN goes through, as in torch.
template <class T> INLINE T f_minimum(T a, T b) { return a < b || a != a ? a : b; }
template <class T> INLINE T f_maximum(T a, T b) { return a > b || a != a ? a : b; }
template <class T> INLINE T f_nan_to_num(T x, T nan, T high, T low) {
  return x != x ? nan : (x == (T)__builtin_inff() ? high : (x == -(T)__builtin_inff() ? low : x));
}
template <class T> INLINE T f_sign(T x) { return (T)((x > (T)0) - (x < (T)0)); }
template <class T> INLINE T f_sigmoid(T x) { return (T)1 / ((T)1 + f_exp(-x)); }
template <class T> INLINE T f_remainder(T x, T y) {
  const T r = f_fmod(x, y);
  return r != (T)0 && (r < (T)0) != (y < (T)0) ? r + y : r;
}
// Processors end the process that divides by 0, which is an error after the call, or the least integer
// by -1, which is the least integer again.
template <class T> INLINE bool is_minus_1(T y) { return y < 0 && y == (T)-1; }
template <class T> INLINE T safe_divisor(T y) { return f_where<T>(y == 0 || is_minus_1(y), (T)1, y); }
template <class T> INLINE T f_integer_divide(T x, T y) {
  return f_where<T>(is_minus_1(y), (T)-x, (T)(x / safe_divisor(y)));
}
template <class T> INLINE T f_integer_fmod(T x, T y) { return (T)(x % safe_divisor(y)); }
template <class T> INLINE T f_integer_remainder(T x, T y) {
  const T r = f_integer_fmod(x, y);
  return r != 0 && (r < 0) != (y < 0) ? r + y : r;
}
template <class T> INLINE T f_integer_floor_divide(T x, T y) {
  const T q = f_integer_divide(x, y);
  return f_integer_fmod(x, y) != 0 && (x < 0) != (y < 0) ? q - 1 : q;
}
// Shifts by a negative number, or by more bits than there are, leave nothing but the sign.
template <class T> INLINE T f_left_shift(T x, T y) {
  constexpr int bits = 8 * sizeof(T);
  return y < 0 || y >= bits ? (T)0 : (T)((uint64_t)x << (y & (bits - 1)));
}
template <class T> INLINE T f_right_shift(T x, T y) {
  constexpr int most = 8 * sizeof(T) - ((T)-1 < (T)0);
  return (T)(x >> (y < 0 || y >= most ? most : (int)y));
}
template <class T> INLINE T f_floor_divide(T x, T y) {  // torch's, of numbers that are not integers
  if (y == (T)0) return x / y;
  T r = f_fmod(x, y), q = (x - r) / y;
  if (r != (T)0 && (y < (T)0) != (r < (T)0)) q -= (T)1;
  if (q == (T)0) return __builtin_copysign((T)0, x / y);
  const T down = f_floor(q);
  return q - down > (T)0.5 ? down + (T)1 : down;
}
template <class T> INLINE T f_lerp(T a, T b, T weight) {
  return f_abs(weight) < (T)0.5 ? a + weight * (b - a) : b - (b - a) * ((T)1 - weight);
}
template <class T> INLINE T f_softplus(T x, T beta, T threshold) {
  const T z = x * beta;
  return z > threshold ? x : f_log1p(f_exp(z)) / beta;
}
template <class T> INLINE T f_softplus_backward(T g, T x, T beta, T threshold) {
  const T z = x * beta, e = f_exp(z);
  return z > threshold ? g : g * e / (e + (T)1);
}
template <class T> INLINE T f_elu(T x, T negative, T positive, T inner) {
  return x > (T)0 ? x * positive : negative * f_expm1(x * inner);
}
template <class T> INLINE T f_elu_backward(T g, T negative, T positive, T inner, bool of_result, T x) {
  const T slope = of_result ? inner * (x + negative) : inner * negative * f_exp(x * inner);
  return x > (T)0 ? g * positive : g * slope;
}
template <class T> INLINE T f_silu_backward(T g, T x) {
  const T s = f_sigmoid(x);
  return g * s * ((T)1 + x * ((T)1 - s));
}
template <class T> INLINE T f_gelu(T x) {
  return x * (T)0.5 * ((T)1 + f_erf(x * (T)0.70710678118654752440));
}
template <class T> INLINE T f_gelu_backward(T g, T x) {
  const T c = (T)0.5 * ((T)1 + f_erf(x * (T)0.70710678118654752440));
  return g * (c + x * (f_exp(x * x * (T)-0.5) * (T)0.39894228040143267794));
}

template <class T>
UNUSED static void add(void* total, const void* more, int64_t first, int64_t end) {
  T* __restrict a = (T*)total;
  const T* __restrict b = (const T*)more;
  for (int64_t k = first; k < end; k++) a[k] += b[k];
}

// An index that is safe to read at; negative ones count from the end.
INLINE int64_t index_in(int64_t k, int64_t extent) {
  const int64_t at = k < 0 ? k + extent : k;
  return (uint64_t)at < (uint64_t)extent ? at : 0;
}
INLINE void note_error(bool is_wrong, int error, Team* team) {
  int none = 0;
  if (is_wrong) __atomic_compare_exchange_n(&team->error, &none, error, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

template <int K, class T, class Get> INLINE int64_t first_largest(Get get) {
  T largest = get(0);
  int64_t at = 0;
  for (int64_t k = 1; k < K; k++) {
    const T x = get(k);
    if (x > largest || (x != x && largest == largest)) largest = x, at = k;
  }
  return at;
}

// ---- Products of matrices ----------------------------------------------------------------------

#if defined(__AVX512F__)
enum { LANES = 16, BLOCK_ROWS = 4, BLOCK_VECTORS = 4 };
#elif defined(__AVX__)
enum { LANES = 8, BLOCK_ROWS = 6, BLOCK_VECTORS = 2 };
#else
enum { LANES = 4, BLOCK_ROWS = 4, BLOCK_VECTORS = 4 };
#endif
typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define UNROLL _Pragma("GCC unroll 8")

template <int COUNT> INLINE Vector load_some(const float* from) {
  Vector v = {};
  __builtin_memcpy(&v, from, COUNT * 4);
  return v;
}
template <int COUNT> INLINE void store_some(float* to, Vector v) { __builtin_memcpy(to, &v, COUNT * 4); }

// P[k][n] = B[k * SK + n * SN], in rows of PADDED numbers; the last ones are 0.
template <int K, int N, int SK, int SN, int PADDED> UNUSED static void pack(const float* __restrict B, float* __restrict P) {
  for (int k = 0; k < K; k++) {
    for (int n = 0; n < N; n++) P[k * PADDED + n] = B[k * SK + n * SN];
    for (int n = N; n < PADDED; n++) P[k * PADDED + n] = 0.0f;
  }
}

// ROWS rows of C from VECTORS vectors of B, of which the last holds LAST numbers.
template <int ROWS, int VECTORS, int LAST, int K, int AM, int AK, int LDB, int LDC, bool PADDED>
INLINE void block(const float* __restrict A, const float* __restrict B, float* __restrict C) {
  CONTRACT
  constexpr int LOADED = PADDED || LAST == LANES ? VECTORS : VECTORS - 1;  // whole vectors of B
  constexpr int STORED = LAST == LANES ? VECTORS : VECTORS - 1;            // and of C
  Vector c[ROWS][VECTORS];
  UNROLL
  for (int i = 0; i < ROWS; i++)
    UNROLL
    for (int j = 0; j < VECTORS; j++) c[i][j] = Vector{};
  for (int k = 0; k < K; k++) {
    Vector b[VECTORS];
    UNROLL
    for (int j = 0; j < LOADED; j++) b[j] = *(const Vector*)(B + (int64_t)k * LDB + j * LANES);
    if constexpr (LOADED < VECTORS) b[LOADED] = load_some<LAST>(B + (int64_t)k * LDB + LOADED * LANES);
    UNROLL
    for (int i = 0; i < ROWS; i++) {
      const Vector a = A[(int64_t)i * AM + (int64_t)k * AK] - Vector{};  // unlike +, this changes no bit
      UNROLL
      for (int j = 0; j < VECTORS; j++) c[i][j] += a * b[j];
    }
  }
  UNROLL
  for (int i = 0; i < ROWS; i++) {
    UNROLL
    for (int j = 0; j < STORED; j++) *(Vector*)(C + (int64_t)i * LDC + j * LANES) = c[i][j];
    if constexpr (STORED < VECTORS) store_some<LAST>(C + (int64_t)i * LDC + STORED * LANES, c[i][STORED]);
  }
}
template <int VECTORS, int LAST, int K, int AM, int AK, int LDB, int LDC, bool PADDED>
CONTRACTED NOINLINE static void panel(const float* __restrict A, const float* __restrict B, float* __restrict C, int64_t rows) {
  int64_t m = 0;
  for (; m + BLOCK_ROWS <= rows; m += BLOCK_ROWS)
    block<BLOCK_ROWS, VECTORS, LAST, K, AM, AK, LDB, LDC, PADDED>(A + m * AM, B, C + m * LDC);
  if (BLOCK_ROWS > 4 && m + 4 <= rows) {
    block<4, VECTORS, LAST, K, AM, AK, LDB, LDC, PADDED>(A + m * AM, B, C + m * LDC);
    m += 4;
  }
  for (; m < rows; m++) block<1, VECTORS, LAST, K, AM, AK, LDB, LDC, PADDED>(A + m * AM, B, C + m * LDC);
}
// Rows of C[M][N] = A (strides AM and AK) * B (rows of LDB numbers).
template <int N, int K, int AM, int AK, int LDB, bool PADDED>
UNUSED static void gemm(const float* __restrict A, const float* __restrict B, float* __restrict C, int64_t first, int64_t end) {
  constexpr int WIDTH = BLOCK_VECTORS * LANES, WHOLE = N / WIDTH * WIDTH, REST = N - WHOLE;
  A += first * AM;
  C += first * N;
  for (int n = 0; n < WHOLE; n += WIDTH) panel<BLOCK_VECTORS, LANES, K, AM, AK, LDB, N, PADDED>(A, B + n, C + n, end - first);
  if constexpr (REST > 0) {
    constexpr int VECTORS = (REST + LANES - 1) / LANES, LAST = REST - (VECTORS - 1) * LANES;
    panel<VECTORS, LAST, K, AM, AK, LDB, N, PADDED>(A, B + WHOLE, C + WHOLE, end - first);
  }
}
// The sum of the numbers of a vector.
INLINE float sum_of(Vector v) {
  float part[LANES];
  __builtin_memcpy(part, &v, sizeof v);
  UNROLL
  for (int half = LANES / 2; half > 0; half /= 2)
    UNROLL
    for (int j = 0; j < half; j++) part[j] += part[j + half];
  return part[0];
}
// ROWS rows of C[M][N], the columns of B from FIRST to END.
template <int ROWS, int FIRST, int END, int N, int K, int AM, int BN>
INLINE void some_dots(const float* __restrict A, const float* __restrict B, float* __restrict C) {
  CONTRACT
  constexpr int COLUMNS = END - FIRST, WHOLE = K / LANES * LANES;
  Vector s[ROWS][COLUMNS];
  UNROLL
  for (int i = 0; i < ROWS; i++)
    UNROLL
    for (int n = 0; n < COLUMNS; n++) s[i][n] = Vector{};
  for (int k = 0; k < WHOLE; k += LANES) {
    UNROLL
    for (int i = 0; i < ROWS; i++) {
      const Vector a = *(const Vector*)(A + (int64_t)i * AM + k);
      UNROLL
      for (int n = 0; n < COLUMNS; n++) s[i][n] += a * *(const Vector*)(B + (int64_t)(FIRST + n) * BN + k);
    }
  }
  UNROLL
  for (int i = 0; i < ROWS; i++)
    UNROLL
    for (int n = 0; n < COLUMNS; n++) {
      float sum = sum_of(s[i][n]);
      for (int k = WHOLE; k < K; k++) sum += A[(int64_t)i * AM + k] * B[(int64_t)(FIRST + n) * BN + k];
      C[i * N + FIRST + n] = sum;
    }
}
template <int FIRST, int N, int K, int AM, int BN>
INLINE void more_dots(const float* __restrict A, const float* __restrict B, float* __restrict C, int64_t rows) {
  constexpr int END = FIRST + 4 < N ? FIRST + 4 : N, ROWS = END - FIRST > 2 ? 2 : 4;
  int64_t m = 0;
  for (; m + ROWS <= rows; m += ROWS) some_dots<ROWS, FIRST, END, N, K, AM, BN>(A + m * AM, B, C + m * N);
  for (; m < rows; m++) some_dots<1, FIRST, END, N, K, AM, BN>(A + m * AM, B, C + m * N);
  if constexpr (END < N) more_dots<END, N, K, AM, BN>(A, B, C, rows);
}
// Rows of C[M][N]; a row of A and a column of B are contiguous. For few columns.
template <int N, int K, int AM, int BN>
CONTRACTED UNUSED static void dots(const float* __restrict A, const float* __restrict B, float* __restrict C, int64_t first, int64_t end) {
  more_dots<0, N, K, AM, BN>(A + first * AM, B, C + first * N, end - first);
}
// Rows of C[M][N] of any strides and type. For small products.
template <class T, int N, int K, int AM, int AK, int BK, int BN>
CONTRACTED UNUSED static void tiny(const T* __restrict A, const T* __restrict B, T* __restrict C, int64_t first, int64_t end) {
  CONTRACT
  for (int64_t m = first; m < end; m++)
    for (int n = 0; n < N; n++) {
      T sum = 0;
      for (int k = 0; k < K; k++) sum += A[m * AM + (int64_t)k * AK] * B[(int64_t)k * BK + (int64_t)n * BN];
      C[m * N + n] = sum;
    }
}
