/* AdamW for one lane after another, each with rates of its own; lane_adamw.py defines it. */

typedef struct {
  float most;   /* gradient norm to clip to */
  float rate;   /* of the update: learning rate over the first moment's bias correction */
  float root;   /* of the second moment's bias correction */
  float shrink; /* learning rate times weight decay */
} LaneRates;

/* weights, gradients, first, second: (lanes, width). decays: (width,). norms: (lanes,), of the
 * gradients, which stay as they are. new_1 and new_2 are 1 - beta: from a rounded beta they would
 * have few digits left. */
void adamw_float(float *weights, const float *gradients, float *first, float *second,
                 const float *decays, const float *norms, const LaneRates *rates, int64_t lanes,
                 int64_t width, float new_1, float beta_2, float new_2, float epsilon,
                 float clip_epsilon, int threads) {
  int64_t piece = 4096, pieces = (width + piece - 1) / piece;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
  for (int64_t lane = 0; lane < lanes; lane++)
    for (int64_t p = 0; p < pieces; p++) {
      const LaneRates r = rates[lane];
      int64_t at = lane * width + p * piece;
      int64_t count = width - p * piece < piece ? width - p * piece : piece;
      float *restrict w = weights + at, *restrict m = first + at, *restrict v = second + at;
      const float *restrict g = gradients + at, *restrict decay = decays + p * piece;
      float clip = r.most / (norms[lane] + clip_epsilon);
      clip = clip > 1.0f ? 1.0f : clip; /* a NaN stays one */
      for (int64_t i = 0; i < count; i++) {
        float gradient = g[i] * clip;
        m[i] += (gradient - m[i]) * new_1;
        v[i] = v[i] * beta_2 + gradient * gradient * new_2;
        float step = m[i] / (sqrtf(v[i]) / r.root + epsilon) * r.rate;
        w[i] = w[i] * (1.0f - r.shrink * decay[i]) - step;
      }
    }
}
