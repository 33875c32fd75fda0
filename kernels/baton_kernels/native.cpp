// The CPU's ops over packed weights and the paged cache, for x86-64 with AVX-512. `native.py` builds and calls them.
//
// Everything is one micro-kernel: up to ROWS rows of A, read as they lie, times a panel of 64 columns of B, which
// was packed before. Data are 32-bit words: one float, or two neighbouring bfloat16 or four int8, whose products
// are added in one instruction.
//
//     C[r][0..63] += sum over w of A[r][w] * B[w][0..63]        A [rows, words], B [words, 64]
//
// A linear layer packs its weight once; attention packs the K and V of 64 positions and multiplies all the query
// rows that share them. The sums of one row are taken in the same order whatever the other rows are, how many there
// are, and how many threads run, so a token's result does not depend on its batch.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int PANEL = 64;
constexpr int ROWS = 6;  // 24 of 32 registers hold sums
constexpr int QUERY_ROWS = 96;  // of attention, about as many share the packing of K and V

using Word = uint32_t;

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }

enum Kind { F32, BF16S, INT8S };  // INT8S: a is unsigned, b is signed, and the sums are int32

template <Kind KIND>
using Sum = std::conditional_t<KIND == INT8S, __m512i, __m512>;

template <Kind KIND>
inline Sum<KIND> multiply_add(Sum<KIND> sum, __m512i b, Word a) {
    const __m512i spread = _mm512_set1_epi32((int)a);
    if constexpr (KIND == INT8S)
        return _mm512_dpbusd_epi32(sum, spread, b);
    else if constexpr (KIND == BF16S)
        return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)spread);
    else
        return _mm512_fmadd_ps(_mm512_castsi512_ps(b), _mm512_castsi512_ps(spread), sum);
}

// `LINES` cache lines of `ahead` are asked for with every word: 4 are read by this one soon, fewer by a later one.
// Without the pragmas gcc unrolls too late and keeps the sums of integers in memory.
template <Kind KIND, int LINES, int R>
void micro(const Word* a, int64_t a_stride, const Word* b, int64_t words, const Word* ahead, float* c, int64_t c_stride,
           bool add) {
    Sum<KIND> sum[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sum[r][i] = add ? *(const Sum<KIND>*)(c + r * c_stride + 16 * i) : Sum<KIND>{};
    for (int64_t w = 0; w < words; w++, b += PANEL, ahead += 16 * LINES) {
        __m512i column[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            column[i] = _mm512_loadu_si512(b + 16 * i);
            if (i < LINES) _mm_prefetch((const char*)(ahead + 16 * i), LINES == 4 ? _MM_HINT_T0 : _MM_HINT_T1);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const Word x = a[r * a_stride + w];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[r][i] = multiply_add<KIND>(sum[r][i], column[i], x);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) *(Sum<KIND>*)(c + r * c_stride + 16 * i) = sum[r][i];
}

// Any number of rows, in parts of nearly equal size.
template <Kind KIND, int LINES>
void multiply_parts(const Word* a, int64_t a_stride, int rows, const Word* b, int64_t words, const Word* ahead, float* c,
                    int64_t c_stride, bool add) {
    for (int parts = (rows + ROWS - 1) / ROWS; parts > 0; parts--) {
        const int r = (rows + parts - 1) / parts;
        switch (r) {
            case 1: micro<KIND, LINES, 1>(a, a_stride, b, words, ahead, c, c_stride, add); break;
            case 2: micro<KIND, LINES, 2>(a, a_stride, b, words, ahead, c, c_stride, add); break;
            case 3: micro<KIND, LINES, 3>(a, a_stride, b, words, ahead, c, c_stride, add); break;
            case 4: micro<KIND, LINES, 4>(a, a_stride, b, words, ahead, c, c_stride, add); break;
            case 5: micro<KIND, LINES, 5>(a, a_stride, b, words, ahead, c, c_stride, add); break;
            default: micro<KIND, LINES, 6>(a, a_stride, b, words, ahead, c, c_stride, add);
        }
        a += r * a_stride;
        c += r * c_stride;
        if (LINES < 4) ahead += 16 * LINES * words;
        rows -= r;
    }
}

template <Kind KIND>
void multiply(const Word* a, int64_t a_stride, int rows, const Word* b, int64_t words, float* c, int64_t c_stride,
              bool add) {
    multiply_parts<KIND, 4>(a, a_stride, rows, b, words, b + 16 * PANEL, c, c_stride, add);
}

// Of a panel that comes from memory. The first part of the rows would wait for it and the others for the arithmetic
// only; so B is taken in pieces that a near cache holds, and every part asks for its share of the next piece. With
// many rows the wait is nothing.
template <Kind KIND>
void multiply_far(const Word* a, int64_t a_stride, int rows, const Word* b, int64_t words, float* c, int64_t c_stride) {
    if (rows <= ROWS || rows > 8 * ROWS) return multiply<KIND>(a, a_stride, rows, b, words, c, c_stride, false);
    const bool few = rows <= 3 * ROWS;
    const int64_t most = few ? 64 : 128;
    for (int64_t w = 0; w < words; w += most) {
        const int64_t size = std::min(words - w, most);
        const Word *piece = b + w * PANEL, *next = piece + size * PANEL;  // of the next panel after the last one
        (few ? multiply_parts<KIND, 2> : multiply_parts<KIND, 1>)(a + w, a_stride, rows, piece, size, next, c, c_stride,
                                                                  w > 0);
    }
}

// 16 rows of 16 words, transposed; `to` has rows of 64 words.
inline void transpose(const Word* const* rows, int64_t first, __mmask16 valid, Word* to) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++)
        x[i] = rows[i] ? _mm512_maskz_loadu_epi32(valid, rows[i] + first) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        if (valid >> i & 1) _mm512_storeu_si512(to + i * PANEL, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
        if (valid >> (i + 8) & 1) _mm512_storeu_si512(to + (i + 8) * PANEL, _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd));
    }
}

// 64 rows of `words` words, null for a row of zeros -> [words, 64].
void pack_panel(const Word* const* rows, int64_t words, Word* to) {
    for (int64_t w = 0; w < words; w += 16) {
        const __mmask16 valid = words - w >= 16 ? 0xffff : (1u << (words - w)) - 1;
        for (int i = 0; i < PANEL; i += 16) transpose(rows + i, w, valid, to + w * PANEL + i);
    }
}

// e^x for x <= 88 to about 1 ulp; 0 for -inf, NaN for NaN.
inline __m512 exponential(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float k : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(k));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(f, f), f), _mm512_set1_ps(1.0f));
    const __mmask16 none = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.0f), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), none, _mm512_setzero_ps());
}

inline __m512 silu(__m512 x) {
    const __m512 e = exponential(_mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), x)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

template <bool BF16>
inline __m512 load_as_float(const char* base, int64_t index, __mmask16 valid) {
    if constexpr (!BF16) return _mm512_maskz_loadu_ps(valid, (const float*)base + index);
    const __m256i half = _mm256_maskz_loadu_epi16(valid, (const uint16_t*)base + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <bool BF16>
inline void store_float(char* base, int64_t index, __m512 x, __mmask16 valid) {
    if constexpr (BF16)
        _mm256_mask_storeu_epi16((uint16_t*)base + index, valid, (__m256i)_mm512_cvtneps_pbh(x));
    else
        _mm512_mask_storeu_ps((float*)base + index, valid, x);
}

inline __m512 round_to_bf16(__m512 x) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// --- linear -------------------------------------------------------------------------------------------------

constexpr int BATCH_ROWS = 96;  // that run through a panel before the next one

struct Linear {
    const char* x;
    int64_t x_stride, rows;
    const Word* packed;  // [panels, words, 64]
    const char* bias;    // or null
    int64_t words, columns, gated;
    char* out;
    int64_t out_stride;
    // Of int8 weights, by column, or null: what they are to be multiplied by, and 128 times their sum.
    const float* scales;
    const int32_t* offsets;
    const char* residual;  // as `out`, and may be `out`: what the rounded result is added to; or null
};

// Each row of x as numbers from 1 to 255, 128 being 0, and what they are to be multiplied by.
template <bool BF16>
void quantise(const Linear& a, uint8_t* to, float* scales) {
    const int64_t size = 4 * a.words;
#pragma omp parallel for schedule(static) if (a.rows * size > 65536)
    for (int64_t r = 0; r < a.rows; r++) {
        const char* from = a.x + r * a.x_stride * (BF16 ? 2 : 4);
        __m512 most = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += 16)
            most = _mm512_max_ps(most, _mm512_abs_ps(load_as_float<BF16>(from, i, first_lanes(size - i))));
        scales[r] = _mm512_reduce_max_ps(most) / 127.0f;
        const __m512 factor = _mm512_set1_ps(scales[r] > 0 ? 1.0f / scales[r] : 0.0f);
        for (int64_t i = 0; i < size; i += 16) {
            const __mmask16 valid = first_lanes(size - i);
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_as_float<BF16>(from, i, valid), factor));
            const __m512i shifted = _mm512_add_epi32(q, _mm512_set1_epi32(128));
            _mm_mask_storeu_epi8(to + r * size + i, valid, _mm512_cvtepi32_epi8(shifted));
        }
    }
}

template <bool BF16, bool INT8>
void linear(const Linear& a) {
    constexpr int64_t size = BF16 ? 2 : 4;
    constexpr Kind KIND = INT8 ? INT8S : BF16 ? BF16S : F32;
    std::vector<uint8_t> quantised(INT8 ? 4 * a.words * a.rows : 0);
    std::vector<float> scales(INT8 ? a.rows : 0);
    if (INT8) quantise<BF16>(a, quantised.data(), scales.data());
    const Word* x = INT8 ? (const Word*)quantised.data() : (const Word*)a.x;
    const int64_t x_stride = INT8 ? a.words : a.x_stride * size / 4;
    const int64_t panels = (a.columns + PANEL - 1) / PANEL, batches = (a.rows + BATCH_ROWS - 1) / BATCH_ROWS;
    // Dynamic: when something else runs on one core, the others go on.
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t panel = 0; panel < panels; panel++) {
        for (int64_t batch = 0; batch < batches; batch++) {
            alignas(64) float c[BATCH_ROWS * PANEL];
            const int64_t first = batch * BATCH_ROWS;
            const int count = (int)std::min<int64_t>(a.rows - first, BATCH_ROWS);
            multiply_far<KIND>(x + first * x_stride, x_stride, count, a.packed + panel * a.words * PANEL, a.words, c,
                               PANEL);
            for (int r = 0; r < count; r++) {
                __m512 sum[4];
                for (int i = 0; i < 4; i++) {
                    sum[i] = load(c + r * PANEL + 16 * i);
                    if constexpr (INT8) {
                        const int64_t column = panel * PANEL + 16 * i;
                        const __m512i offset = _mm512_loadu_si512(a.offsets + column);
                        const __m512i exact = _mm512_sub_epi32(_mm512_castps_si512(sum[i]), offset);
                        const __m512 scale = _mm512_mul_ps(load(a.scales + column), _mm512_set1_ps(scales[first + r]));
                        sum[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale);
                    }
                }
                if (a.gated)
                    for (int i = 0; i < 2; i++) sum[i] = _mm512_mul_ps(silu(sum[i]), sum[i + 2]);
                for (int i = 0; i < (a.gated ? 2 : 4); i++) {
                    const int64_t column = panel * (a.gated ? PANEL / 2 : PANEL) + 16 * i;
                    const __mmask16 valid = first_lanes((a.gated ? a.columns / 2 : a.columns) - column);
                    if (a.bias) sum[i] = _mm512_add_ps(sum[i], load_as_float<BF16>(a.bias, column, valid));
                    if (a.residual) {
                        const char* from = a.residual + (first + r) * a.out_stride * size;
                        if (BF16) sum[i] = round_to_bf16(sum[i]);
                        sum[i] = _mm512_add_ps(load_as_float<BF16>(from, column, valid), sum[i]);
                    }
                    store_float<BF16>(a.out + (first + r) * a.out_stride * size, column, sum[i], valid);
                }
            }
        }
    }
}

// --- norm ---------------------------------------------------------------------------------------------------

// x / sqrt(mean(x^2) + eps), rounded, times weight; `shifted`: not rounded before, times 1 + weight.
template <bool BF16>
void rms_norm(const char* x, int64_t x_stride, int64_t rows, int64_t dim, const char* weight, float eps, bool shifted,
              char* out) {
    constexpr int64_t size = BF16 ? 2 : 4;
#pragma omp parallel for schedule(static) if (rows * dim > 65536)
    for (int64_t r = 0; r < rows; r++) {
        const char* from = x + r * x_stride * size;
        char* to = out + r * dim * size;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += 16) {
            const __m512 v = load_as_float<BF16>(from, d, first_lanes(dim - d));
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / dim + eps));
        for (int64_t d = 0; d < dim; d += 16) {
            const __mmask16 valid = first_lanes(dim - d);
            __m512 v = _mm512_mul_ps(load_as_float<BF16>(from, d, valid), factor);
            __m512 w = load_as_float<BF16>(weight, d, valid);
            if (shifted) w = _mm512_add_ps(w, _mm512_set1_ps(1.0f));
            if (BF16 && !shifted) v = round_to_bf16(v);
            store_float<BF16>(to, d, _mm512_mul_ps(v, w), valid);
        }
    }
}

// --- rotation -----------------------------------------------------------------------------------------------

// The first 2 * half elements of each head, in place: x * cos + (-second half, first half) * sin, rounded as often as
// the three operations one after another.
template <bool BF16>
void rotate(char* x, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads, int64_t half,
            const char* cos, const char* sin) {
    constexpr int64_t size = BF16 ? 2 : 4;
    auto product = [](__m512 a, __m512 b) {
        const __m512 exact = _mm512_mul_ps(a, b);
        return BF16 ? round_to_bf16(exact) : exact;
    };
#pragma omp parallel for schedule(static) if (tokens * heads * half > 65536)
    for (int64_t t = 0; t < tokens; t++) {
        const char *cosines = cos + 2 * half * t * size, *sines = sin + 2 * half * t * size;
        for (int64_t h = 0; h < heads; h++) {
            char* head = x + (t * token_stride + h * head_stride) * size;
            for (int64_t d = 0; d < half; d += 16) {
                const __mmask16 valid = first_lanes(half - d);
                auto at = [&](const char* row, int64_t first) { return load_as_float<BF16>(row, first + d, valid); };
                const __m512 low = at(head, 0), high = at(head, half);
                const __m512 a = product(low, at(cosines, 0)), b = product(high, at(sines, 0));
                const __m512 c = product(high, at(cosines, half)), e = product(low, at(sines, half));
                store_float<BF16>(head, d, _mm512_sub_ps(a, b), valid);
                store_float<BF16>(head, half + d, _mm512_add_ps(c, e), valid);
            }
        }
    }
}

// --- attention ----------------------------------------------------------------------------------------------

struct Cache {
    char* base;
    int64_t block_stride, position_stride, head_stride;  // in elements
    int64_t dim;
};

struct Attention {
    const char* query;
    int64_t query_token_stride, query_head_stride;
    char* out;  // [T, heads, value.dim]
    Cache key, value;
    const int32_t* tables;  // [seqs, table_stride]
    int64_t table_stride;
    const int32_t* starts;  // [seqs + 1], of the tokens of each sequence
    const int32_t* lens;  // [seqs], context, these tokens included
    int64_t seqs, heads, kv_heads, block_shift;  // of 2 to the power of block_shift positions
    float scale, softcap;  // 0: none
    int64_t window;  // 0: none
    int64_t chunked;
    const float* sinks;  // [heads], or null
};

// What one thread needs for up to `rows` query rows.
template <bool BF16>
struct Scratch {
    const int64_t k_words, v_panels;
    Word *query, *keys, *values, *weights;
    float *scores, *sums, *top, *total, *shrink;

    Scratch(int64_t rows, int64_t k_dim, int64_t v_dim)
        : k_words(BF16 ? k_dim / 2 : k_dim), v_panels((v_dim + PANEL - 1) / PANEL) {
        const int64_t sizes[] = {rows * k_words, k_words * PANEL, v_panels * PANEL * PANEL, rows * PANEL, rows * PANEL,
                                 rows * v_panels * PANEL, rows, rows, rows};
        Word* parts[9];
        int64_t length = 0;
        for (int64_t size : sizes) length += (size + 15) / 16 * 16;
        memory = next = (Word*)std::aligned_alloc(64, 4 * length);
        for (int i = 0; i < 9; i++) parts[i] = next, next += (sizes[i] + 15) / 16 * 16;
        query = parts[0], keys = parts[1], values = parts[2], weights = parts[3];
        scores = (float*)parts[4], sums = (float*)parts[5];
        top = (float*)parts[6], total = (float*)parts[7], shrink = (float*)parts[8];
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;

  private:
    Word *memory, *next;
};

// Pointers to the rows of positions [first, first + 64) of one head; null from `end` on. What they point to is on its
// way into the cache afterwards: the rows of a head are too short and too far apart for the CPU to see it coming.
template <bool BF16>
void find_rows(const Attention& a, const Cache& cache, const int32_t* table, int64_t head, int64_t first, int64_t end,
               const Word** rows) {
    const int64_t last_in_block = ((int64_t)1 << a.block_shift) - 1;
    for (int i = 0; i < PANEL; i++) {
        const int64_t p = first + i;
        if (p >= end) {
            rows[i] = nullptr;
            continue;
        }
        const int64_t index = table[p >> a.block_shift] * cache.block_stride +
                              (p & last_in_block) * cache.position_stride + head * cache.head_stride;
        rows[i] = (const Word*)(cache.base + (BF16 ? 2 : 4) * index);
        for (int64_t byte = 0; byte < (BF16 ? 2 : 4) * cache.dim; byte += 64)
            _mm_prefetch((const char*)rows[i] + byte, _MM_HINT_T1);
    }
}

// V of 64 positions: panels of 64 dims, in each [positions or pairs of them, 64].
template <bool BF16>
void pack_values(const Word* const* rows, int64_t dim, Word* to) {
    const int64_t words = BF16 ? PANEL / 2 : PANEL;
    for (int64_t panel = 0; panel * PANEL < dim; panel++)
        for (int64_t w = 0; w < words; w++)
            for (int i = 0; i < 4; i++, to += 16) {
                const int64_t d = panel * PANEL + 16 * i;
                const __mmask16 valid = first_lanes(dim - d);
                auto at = [&](int64_t p) {
                    return rows[p] ? _mm512_castps_si512(load_as_float<BF16>((const char*)rows[p], d, valid))
                                   : _mm512_setzero_si512();
                };
                if constexpr (BF16)
                    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(at(2 * w), 16), at(2 * w + 1)));
                else
                    _mm512_storeu_si512(to, at(w));
            }
}

// Scores of one row over 64 positions, of which it sees [low, high) -> weights; the row's maximum and total move on.
template <bool BF16>
void soften(const Attention& a, float* scores, Word* weights, int64_t low, int64_t high, float& top, float& total,
            float& shrink) {
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    __m512 s[4], most = hidden;
    for (int i = 0; i < 4; i++) {
        const __mmask16 seen = first_lanes(high - 16 * i) & ~first_lanes(low - 16 * i);
        s[i] = _mm512_mul_ps(load(scores + 16 * i), _mm512_set1_ps(a.scale));
        if (a.softcap > 0) {  // cap tanh(s / cap)
            const __m512 cap = _mm512_set1_ps(a.softcap), two = _mm512_set1_ps(2.0f);
            const __m512 t = _mm512_min_ps(_mm512_set1_ps(80.0f), _mm512_div_ps(_mm512_mul_ps(s[i], two), cap));
            const __m512 e = _mm512_add_ps(exponential(t), _mm512_set1_ps(1.0f));
            s[i] = _mm512_mul_ps(cap, _mm512_sub_ps(_mm512_set1_ps(1.0f), _mm512_div_ps(two, e)));
        }
        s[i] = _mm512_mask_mov_ps(hidden, seen, s[i]);
        most = _mm512_max_ps(most, s[i]);
    }
    const float new_top = std::fmax(top, _mm512_reduce_max_ps(most));
    shrink = std::exp(top - new_top);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) {
        s[i] = exponential(_mm512_sub_ps(s[i], _mm512_set1_ps(new_top)));
        sum = _mm512_add_ps(sum, s[i]);
        store_float<BF16>((char*)weights, 16 * i, s[i], 0xffff);
    }
    total = total * shrink + _mm512_reduce_add_ps(sum);
    top = new_top;
}

// Tokens [first, first + count) of sequence `seq`, and all query heads of one KV head.
template <bool BF16>
void attend(const Attention& a, const Scratch<BF16>& s, int64_t seq, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t group = a.heads / a.kv_heads, rows = count * group, element = BF16 ? 2 : 4;
    const int64_t own = a.lens[seq] - (a.starts[seq + 1] - a.starts[seq]) + first;  // position of the first token
    const int64_t end = own + count, v_stride = s.v_panels * PANEL, w_words = BF16 ? PANEL / 2 : PANEL;
    const int32_t* table = a.tables + seq * a.table_stride;
    constexpr Kind KIND = BF16 ? BF16S : F32;
    auto first_seen = [&](int64_t p) -> int64_t {
        if (!a.window) return 0;
        return a.chunked ? p / a.window * a.window : p - a.window + 1 > 0 ? p - a.window + 1 : 0;
    };
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = a.starts[seq] + first + r / group, head = kv_head * group + r % group;
        std::memcpy(s.query + r * s.k_words,
                    a.query + element * (token * a.query_token_stride + head * a.query_head_stride), 4 * s.k_words);
        s.top[r] = a.sinks ? a.sinks[head] : -INFINITY;
        s.total[r] = a.sinks ? 1.0f : 0.0f;
    }
    std::memset(s.sums, 0, rows * v_stride * sizeof(float));
    const Word *keys[2][PANEL], *values[2][PANEL];  // of this tile and the next
    const int64_t first_tile = first_seen(own) / PANEL * PANEL;
    find_rows<BF16>(a, a.key, table, kv_head, first_tile, end, keys[0]);
    find_rows<BF16>(a, a.value, table, kv_head, first_tile, end, values[0]);
    for (int64_t tile = first_tile, turn = 0; tile < end; tile += PANEL, turn ^= 1) {
        pack_panel(keys[turn], s.k_words, s.keys);
        find_rows<BF16>(a, a.key, table, kv_head, tile + PANEL, end, keys[turn ^ 1]);
        // Tokens before the tile see nothing of it.
        const int64_t skipped = tile > own ? (tile - own) * group : 0;
        multiply<KIND>(s.query + skipped * s.k_words, s.k_words, (int)(rows - skipped), s.keys, s.k_words,
                       s.scores + skipped * PANEL, PANEL, false);
        pack_values<BF16>(values[turn], a.value.dim, s.values);
        find_rows<BF16>(a, a.value, table, kv_head, tile + PANEL, end, values[turn ^ 1]);
        for (int64_t r = skipped; r < rows; r++) {
            const int64_t p = own + r / group, low = first_seen(p) - tile, high = p + 1 - tile;
            Word* weights = s.weights + r * w_words;
            s.shrink[r] = 1.0f;
            if (low >= PANEL)
                std::memset(weights, 0, 4 * w_words);
            else
                soften<BF16>(a, s.scores + r * PANEL, weights, low, high, s.top[r], s.total[r], s.shrink[r]);
            if (s.shrink[r] != 1.0f)
                for (int64_t d = 0; d < v_stride; d += 16) {
                    float* sum = s.sums + r * v_stride + d;
                    _mm512_storeu_ps(sum, _mm512_mul_ps(load(sum), _mm512_set1_ps(s.shrink[r])));
                }
        }
        for (int64_t panel = 0; panel < s.v_panels; panel++)
            multiply<KIND>(s.weights + skipped * w_words, w_words, (int)(rows - skipped),
                           s.values + panel * w_words * PANEL, w_words,
                           s.sums + skipped * v_stride + panel * PANEL, v_stride, true);
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = a.starts[seq] + first + r / group, head = kv_head * group + r % group;
        char* to = a.out + element * (token * a.heads + head) * a.value.dim;
        const __m512 share = _mm512_set1_ps(1.0f / s.total[r]);
        for (int64_t d = 0; d < a.value.dim; d += 16)
            store_float<BF16>(to, d, _mm512_mul_ps(load(s.sums + r * v_stride + d), share),
                              first_lanes(a.value.dim - d));
    }
}

template <bool BF16>
void paged_attention(const Attention& a) {
    const int64_t group = a.heads / a.kv_heads;
    const int64_t most_tokens = std::max<int64_t>(1, QUERY_ROWS / group);
    struct Piece {
        int64_t seq, first, count;
    };
    std::vector<Piece> pieces;
    int64_t tokens = 1;
    for (int64_t seq = 0; seq < a.seqs; seq++) {
        const int64_t end = a.starts[seq + 1] - a.starts[seq];
        for (int64_t first = 0; first < end; first += most_tokens) {
            pieces.push_back({seq, first, std::min(end - first, most_tokens)});
            tokens = std::max(tokens, pieces.back().count);
        }
    }
    const int64_t num_pieces = (int64_t)pieces.size() * a.kv_heads;
#pragma omp parallel
    {
        const Scratch<BF16> scratch(tokens * group, a.key.dim, a.value.dim);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_pieces; i++) {
            // Later chunks see more, so they come first.
            const Piece& piece = pieces[pieces.size() - 1 - i / a.kv_heads];
            attend<BF16>(a, scratch, piece.seq, i % a.kv_heads, piece.first, piece.count);
        }
    }
}

// rows [tokens, heads, bytes] of the given strides in bytes, each into the cache at its slot; so are the cache's.
void write(const char* rows, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads, int64_t bytes,
           char* cache, int64_t block_stride, int64_t position_stride, int64_t cache_head_stride, const int64_t* blocks,
           const int64_t* offsets) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            std::memcpy(cache + blocks[t] * block_stride + offsets[t] * position_stride + h * cache_head_stride,
                        rows + t * token_stride + h * head_stride, bytes);
}

// --- decoder layer ------------------------------------------------------------------------------------------

// The operations above one after another, each rounded as if it were called by itself:
//
//     x += out(attention(rotate(qkv(norm(x)))));  x += down(gated(norm(x)))

struct Norm {
    const char* weight;  // null: there is none
    float eps;
    int32_t shifted;
};

struct Weight {
    const Word* packed;
    const char* bias;
    int64_t words, columns;
    const float* scales;
    const int32_t* offsets;
};

struct Layer {
    Norm before, query, key, after;  // of attention; of its heads; of attention, before the MLP
    Weight qkv, out, gate_up, down;
    int64_t hidden, heads, kv_heads, head_dim;
    float scale, softcap;
    const float* sinks;
};

struct Paged {
    Cache key, value;
    int64_t block_shift, window, chunked, writes;
};

struct Step {
    const char* x;  // [tokens, hidden]
    char* out;      // the same
    const char *cos, *sin;  // [tokens, 2 * half]
    int64_t half, tokens;
    const int64_t *blocks, *offsets;
    const int32_t* tables;
    int64_t table_stride;
    const int32_t *starts, *lens;
    int64_t seqs;
    char *normed, *qkv, *attended, *gated;  // [tokens, ...]: between two operations
};

template <bool BF16>
void normalise(const Norm& norm, const char* x, int64_t rows, int64_t dim, char* out) {
    rms_norm<BF16>(x, dim, rows, dim, norm.weight, norm.eps, norm.shifted, out);
}

template <bool BF16>
void product(const Weight& w, const char* x, int64_t rows, bool gated, const char* residual, char* out) {
    const int64_t x_stride = w.words * (w.scales ? 4 : BF16 ? 2 : 1), out_stride = gated ? w.columns / 2 : w.columns;
    const Linear call = {x,   x_stride,   rows,     w.packed,  w.bias,  w.words, w.columns, gated,
                         out, out_stride, w.scales, w.offsets, residual};
    w.scales ? linear<BF16, true>(call) : linear<BF16, false>(call);
}

// Up to the KV in the cache; the turned queries are in step.qkv.
template <bool BF16>
void layer_write(const Layer& l, const Paged& paged, const Step& step) {
    const int64_t size = BF16 ? 2 : 4, dim = l.head_dim, width = (l.heads + 2 * l.kv_heads) * dim;
    char *query = step.qkv, *key = query + l.heads * dim * size, *value = key + l.kv_heads * dim * size;
    normalise<BF16>(l.before, step.x, step.tokens, l.hidden, step.normed);
    product<BF16>(l.qkv, step.normed, step.tokens, false, nullptr, step.qkv);
#pragma omp parallel for schedule(static) if (l.query.weight && step.tokens * width > 65536)
    for (int64_t t = 0; t < (l.query.weight ? step.tokens : 0); t++) {
        char *q = query + t * width * size, *k = key + t * width * size;
        normalise<BF16>(l.query, q, l.heads, dim, q);
        normalise<BF16>(l.key, k, l.kv_heads, dim, k);
    }
    // Queries and keys lie side by side.
    rotate<BF16>(query, width, dim, step.tokens, l.heads + l.kv_heads, step.half, step.cos, step.sin);
    if (!paged.writes) return;
    for (const auto& [rows, cache] : {std::pair{key, paged.key}, std::pair{value, paged.value}})
        write(rows, width * size, dim * size, step.tokens, l.kv_heads, dim * size, cache.base, cache.block_stride * size,
              cache.position_stride * size, cache.head_stride * size, step.blocks, step.offsets);
}

template <bool BF16>
void layer_finish(const Layer& l, const Paged& paged, const Step& step) {
    const int64_t width = (l.heads + 2 * l.kv_heads) * l.head_dim;
    paged_attention<BF16>({step.qkv, width, l.head_dim, step.attended, paged.key, paged.value, step.tables,
                           step.table_stride, step.starts, step.lens, step.seqs, l.heads, l.kv_heads, paged.block_shift,
                           l.scale, l.softcap, paged.window, paged.chunked, l.sinks});
    product<BF16>(l.out, step.attended, step.tokens, false, step.x, step.out);
    normalise<BF16>(l.after, step.out, step.tokens, l.hidden, step.normed);
    product<BF16>(l.gate_up, step.normed, step.tokens, true, nullptr, step.gated);
    product<BF16>(l.down, step.gated, step.tokens, false, step.out, step.out);
}

}  // namespace

extern "C" {

// Bit 0: float32 runs here, bit 1: bfloat16, bit 2: int8 weights.
int baton_supported() {
    const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return (base ? 1 : 0) | (base && __builtin_cpu_supports("avx512bf16") ? 2 : 0) |
           (base && __builtin_cpu_supports("avx512vnni") ? 4 : 0);
}

// weight [rows, words] -> [ceil(rows / 64), words, 64]
void baton_pack(const Word* weight, int64_t rows, int64_t words, Word* to) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < (rows + PANEL - 1) / PANEL; panel++) {
        const Word* at[PANEL];
        for (int i = 0; i < PANEL; i++)
            at[i] = panel * PANEL + i < rows ? weight + (panel * PANEL + i) * words : nullptr;
        pack_panel(at, words, to + panel * words * PANEL);
    }
}

void baton_linear(int bf16, const Linear* a) {
    if (a->scales)
        (bf16 ? linear<true, true> : linear<false, true>)(*a);
    else
        (bf16 ? linear<true, false> : linear<false, false>)(*a);
}

void baton_rms_norm(int bf16, const char* x, int64_t x_stride, int64_t rows, int64_t dim, const char* weight, float eps,
                    int shifted, char* out) {
    (bf16 ? rms_norm<true> : rms_norm<false>)(x, x_stride, rows, dim, weight, eps, shifted, out);
}

void baton_rotate(int bf16, char* x, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads,
                  int64_t half, const char* cos, const char* sin) {
    (bf16 ? rotate<true> : rotate<false>)(x, token_stride, head_stride, tokens, heads, half, cos, sin);
}

void baton_write(const char* rows, int64_t token_stride, int64_t head_stride, int64_t tokens, int64_t heads,
                 int64_t bytes, char* cache, int64_t block_stride, int64_t position_stride, int64_t cache_head_stride,
                 const int64_t* blocks, const int64_t* offsets) {
    write(rows, token_stride, head_stride, tokens, heads, bytes, cache, block_stride, position_stride,
          cache_head_stride, blocks, offsets);
}

void baton_attention(int bf16, const Attention* a) {
    (bf16 ? paged_attention<true> : paged_attention<false>)(*a);
}

void baton_layer_write(int bf16, const Layer* layer, const Paged* paged, const Step* step) {
    (bf16 ? layer_write<true> : layer_write<false>)(*layer, *paged, *step);
}

void baton_layer_finish(int bf16, const Layer* layer, const Paged* paged, const Step* step) {
    (bf16 ? layer_finish<true> : layer_finish<false>)(*layer, *paged, *step);
}
}
