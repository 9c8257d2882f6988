/* The sums of NCCL, in the order of the ranks and rounded after each, as in its ring. */
#include "null_nccl.h"
#include <math.h>

size_t null_nccl_size(ncclDataType_t type) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return sizes[type];
}
/* There is no arithmetic for 8-bit floating point numbers here, which can be moved. */
int null_nccl_reduces(ncclDataType_t type) { return type <= ncclBfloat16; }

static float of_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}
static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value)) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float of_half(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? ldexpf((float)(fraction | 1024), exponent - 25)
                                 : ldexpf((float)fraction, -24);
    return bits >> 15 ? -value : value;
}
static uint16_t to_half(float value) {
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    float size = fabsf(value);
    if (isnan(value)) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    int exponent;
    frexpf(size, &exponent);
    exponent = size && exponent > -13 ? exponent : -13; /* below lie those without a leading one */
    /* Rounds half to even; one too many in the fraction goes into the exponent, where it belongs. */
    int fraction = (int)rintf(ldexpf(size, 11 - exponent));
    return sign | (uint16_t)(((exponent + 13) << 10) + fraction);
}

#define SAME(x) (x)
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))

/* Numbers of type `stored` that are computed as `wide`. */
#define ARITHMETIC(name, stored, wide, load, store, larger, smaller)                                                \
    static void scale_##name(stored *data, size_t count, const stored *scalar) {                                   \
        for (size_t i = 0; i < count; i++) data[i] = store(load(data[i]) * load(*scalar));                         \
    }                                                                                                              \
    static void reduce_##name(stored *sum, const stored *more, size_t count, ncclRedOp_t how, wide divisor) {      \
        for (size_t i = 0; i < count; i++) {                                                                       \
            wide a = load(sum[i]), b = load(more[i]);                                                              \
            wide c = how == ncclProd ? a * b : how == ncclMax ? larger(a, b) : how == ncclMin ? smaller(a, b) : a + b; \
            sum[i] = store(divisor == 1 ? c : c / divisor);                                                        \
        }                                                                                                          \
    }
#define INTEGERS(name, type) ARITHMETIC(name, type, type, SAME, SAME, LARGER, SMALLER)
INTEGERS(int8, int8_t)
INTEGERS(uint8, uint8_t)
INTEGERS(int32, int32_t)
INTEGERS(uint32, uint32_t)
INTEGERS(int64, int64_t)
INTEGERS(uint64, uint64_t)
ARITHMETIC(half, uint16_t, float, of_half, to_half, fmaxf, fminf)
ARITHMETIC(bfloat16, uint16_t, float, of_bfloat16, to_bfloat16, fmaxf, fminf)
ARITHMETIC(float, float, float, SAME, SAME, fmaxf, fminf)
ARITHMETIC(double, double, double, SAME, SAME, fmax, fmin)

#define FOR_ALL_TYPES(DO)          \
    DO(ncclInt8, int8)             \
    DO(ncclUint8, uint8)           \
    DO(ncclInt32, int32)           \
    DO(ncclUint32, uint32)         \
    DO(ncclInt64, int64)           \
    DO(ncclUint64, uint64)         \
    DO(ncclFloat16, half)          \
    DO(ncclBfloat16, bfloat16)     \
    DO(ncclFloat32, float)         \
    DO(ncclFloat64, double)

/* The n-th part of one as a scalar: of floating point numbers NCCL divides before it adds, of integers afterwards. */
static const void *part(ncclDataType_t type, int n, void *place) {
    switch (type) {
    case ncclFloat16: *(uint16_t *)place = to_half(1.0f / n); break;
    case ncclBfloat16: *(uint16_t *)place = to_bfloat16(1.0f / n); break;
    case ncclFloat32: *(float *)place = 1.0f / n; break;
    case ncclFloat64: *(double *)place = 1.0 / n; break;
    default: return NULL;
    }
    return place;
}

void null_nccl_scale(void *data, size_t count, const struct Operation *o) {
    double place;
    const void *scalar = NULL;
    if (o->call.reduction == ncclAvg) scalar = part(o->call.type, o->comm->size, &place);
    if (o->call.reduction >= ncclNumOps) scalar = o->scalar.on_device ? o->scalar.on_device : o->scalar.value;
    if (!scalar) return;
    switch (o->call.type) {
#define SCALE(type, name) case type: scale_##name(data, count, scalar); break;
        FOR_ALL_TYPES(SCALE)
    default: break;
    }
}

void null_nccl_reduce(void *sum, const void *more, size_t count, const struct Operation *o, int rank) {
    double place;
    ncclDataType_t type = o->call.type;
    if (rank == 0) {
        memcpy(sum, more, count * null_nccl_size(type));
        return;
    }
    int divides = o->call.reduction == ncclAvg && rank == o->comm->size - 1 && !part(type, 1, &place);
    int divisor = divides ? o->comm->size : 1;
    switch (type) {
#define REDUCE(type, name) case type: reduce_##name(sum, more, count, o->call.reduction, divisor); break;
        FOR_ALL_TYPES(REDUCE)
    default: break;
    }
}
