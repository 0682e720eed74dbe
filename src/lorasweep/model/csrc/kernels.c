/* The packed engine's own loops on a CPU.
 *
 * Compiled for the machine at hand by model/kernel_build.py; model/kernels.py calls them. What
 * they compute is defined in Python, where torch does the same for every other device and for
 * machines without a compiler; tests hold the two to each other.
 *
 * Every loop runs over rows or tokens, and no number of one lane ever meets one of another, so a
 * NaN stays in its trial. No option may let the compiler assume that there are no NaNs.
 */
#include "numbers.h"

#include "attention_rows.h"
#include "pairs.h"

#include "lane_products.h"

/* Once for each type of activations. */
#define SCALAR float
#define NAMED(name) name##_float
#define ENTRY NAMED
#define WIDEN widen_float
#define NARROW narrow_float
#include "attention.h"
#include "dropout.h"
#undef SCALAR
#undef NAMED
#undef ENTRY
#undef WIDEN
#undef NARROW

#define SCALAR bf16
#define NAMED(name) name##_bf16
#ifdef PAIRS
#define ENTRY(name) name##_any_bf16
#else
#define ENTRY NAMED
#endif
#define WIDEN widen_bf16
#define NARROW narrow_bf16
#include "attention.h"
#include "dropout.h"

#ifdef PAIRS
#include "attention_pairs.h"
#endif
