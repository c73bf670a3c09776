// The Python module of the native backend: allocates, selects the stream, launches, and implements autograd. Users' arguments are
// checked in bird_kernels/inputs.py, or by at_once.h for calls that C++ makes on its own.
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/extension.h>

#ifdef BIRD_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "at_once.h"
#include "kernels.h"

namespace bird {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The number that the emulation on a CPU pretends to have, so that tests split the products of narrow features, too.
constexpr int EMULATED_MULTIPROCESSORS = 4;

struct Options {
  Statistic statistic;
  bool unbiased, exact;
};

struct Device {
  int multiprocessors = EMULATED_MULTIPROCESSORS;
  void* stream = nullptr;

  explicit Device(const Tensor& x) {
#ifdef BIRD_CUDA
    if (x.is_cuda()) {
      multiprocessors = cuda::multiprocessors(x.get_device());
      stream = c10::cuda::getCurrentCUDAStream().stream();
    }
#endif
  }
};

#ifdef BIRD_CUDA
using Guard = c10::cuda::OptionalCUDAGuard;
Guard guard(const Tensor& x) { return x.is_cuda() ? Guard(x.device()) : Guard(); }
#else
int guard(const Tensor&) { return 0; }
#endif

template <class... Arguments>
void launch_forward(bool cuda, Arguments&&... arguments) {
#ifdef BIRD_CUDA
  if (cuda) return cuda::forward(arguments...);
#endif
  TORCH_CHECK(!cuda, "bird_kernels: the native part was built without CUDA");
  emulation::forward(arguments...);
}

template <class... Arguments>
void launch_backward(bool cuda, Arguments&&... arguments) {
#ifdef BIRD_CUDA
  if (cuda) return cuda::backward(arguments...);
#endif
  TORCH_CHECK(!cuda, "bird_kernels: the native part was built without CUDA");
  emulation::backward(arguments...);
}

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    default: TORCH_CHECK_TYPE(false, "bird_kernels: the native part has no kernels for ", x.scalar_type());
  }
}

Features features(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.size(1), 1}; }

const bool* mask_data(const Tensor& mask) { return mask.defined() ? mask.const_data_ptr<bool>() : nullptr; }

Tensor dense(const std::optional<Tensor>& mask) { return mask.has_value() ? mask->contiguous() : Tensor(); }

// Value (0-d), coefficients [11] and the Gram matrices K, L [n, n] of x [n, p], y [n, q].
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y, const Tensor& mask, const Options& options) {
  const int64_t n = x.size(0);
  TORCH_CHECK_VALUE(n <= MAX_ROWS, "bird_kernels: the native part takes at most ", MAX_ROWS, " rows, got ", n);
  const auto current = guard(x);
  const Device device(x);
  const auto fp32 = x.options().dtype(at::kFloat).requires_grad(false);
  Forward call{features(x), features(y)};
  call.shape = plan_forward(static_cast<int>(n), call.x, call.y, device.multiprocessors);
  const int64_t partials = static_cast<int64_t>(call.x.splits + call.y.splits) * call.shape.pairs * call.shape.tile * call.shape.tile;
  const Tensor workspace = at::empty({partials}, fp32);
  const Tensor slots = at::empty({2 * MAX_REDUCE_BLOCKS * MOMENTS + 1}, fp32.dtype(at::kDouble));  // and the counter
  const Tensor value = at::empty({}, fp32), coefficients = at::empty({COEFFICIENTS}, fp32.dtype(at::kDouble));
  const Tensor k = at::empty({n, n}, fp32), l = at::empty({n, n}, fp32);
  call.mask = mask_data(mask);
  call.n = static_cast<int>(n);
  call.statistic = options.statistic;
  call.unbiased = options.unbiased;
  call.partials = workspace.mutable_data_ptr<float>();
  call.slots = slots.mutable_data_ptr<double>();
  call.counter = reinterpret_cast<int*>(call.slots + 2 * MAX_REDUCE_BLOCKS * MOMENTS);
  call.k = k.mutable_data_ptr<float>();
  call.l = l.mutable_data_ptr<float>();
  call.coefficients = coefficients.mutable_data_ptr<double>();
  call.value = value.mutable_data_ptr<float>();
  launch_forward(x.is_cuda(), type_of(x), options.exact, call, device.stream);
  return {value, coefficients, k, l};
}

// The gradients of the sides for which one is wanted, in the dtype of the features; undefined tensors for the others.
std::pair<Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& mask, const Tensor& coefficients, const Tensor& k,
    const Tensor& l, const Options& options, bool x_grad, bool y_grad) {
  const auto current = guard(x);
  const Device device(x);
  std::pair<Tensor, Tensor> gradients;
  Backward call{};
  const auto add = [&](const Tensor& own, const Tensor& own_gram, const Tensor& other_gram, bool second, Tensor& out) {
    out = at::empty(own.sizes(), own.options().requires_grad(false));
    call.sides[call.count++] = {
        features(own), own_gram.const_data_ptr<float>(), other_gram.const_data_ptr<float>(), out.mutable_data_ptr(), second};
  };
  if (x_grad) add(x, k, l, false, gradients.first);
  if (y_grad) add(y, l, k, true, gradients.second);
  if (call.count == 0) return gradients;
  call.mask = mask_data(mask);
  call.n = static_cast<int>(x.size(0));
  call.unbiased = options.unbiased;
  call.coefficients = coefficients.const_data_ptr<double>();
  const Tensor upstream = grad.scalar_type() == at::kFloat ? grad : grad.to(at::kFloat);
  call.grad = upstream.const_data_ptr<float>();
  launch_backward(x.is_cuda(), type_of(x), options.exact, call, device.multiprocessors, device.stream);
  return gradients;
}

// The Python function (grad, x, y, mask, coefficients, k, l, statistic, unbiased, exact, x_grad, y_grad) -> (dx, dy) that computes
// a backward which is differentiated itself, runs under a dispatch mode, or whose upstream gradient is a lazy negative or batched. It
// is never destroyed, because the interpreter may be finalised before static objects are.
py::object& differentiable_backward() {
  static py::object* const function = new py::object();
  return *function;
}

class Alignment : public torch::autograd::Function<Alignment> {
 public:
  static Tensor forward(
      AutogradContext* context, const Tensor& x, const Tensor& y, const std::optional<Tensor>& given_mask, int64_t statistic,
      bool unbiased, bool exact) {
    const Tensor mask = dense(given_mask);
    auto [value, coefficients, k, l] = bird::forward(x, y, mask, {static_cast<Statistic>(statistic), unbiased, exact});
    context->save_for_backward({x, y, mask, coefficients, k, l});
    context->saved_data["statistic"] = statistic;
    context->saved_data["unbiased"] = unbiased;
    context->saved_data["exact"] = exact;
    return value;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &mask = saved[2], &coefficients = saved[3], &k = saved[4], &l = saved[5];
    const auto statistic = context->saved_data["statistic"].toInt();
    const bool unbiased = context->saved_data["unbiased"].toBool(), exact = context->saved_data["exact"].toBool();
    const bool x_grad = context->needs_input_grad(0), y_grad = context->needs_input_grad(1);
    std::pair<Tensor, Tensor> gradients;
    const bool batched = grads[0].key_set().has(c10::DispatchKey::Batched);  // torch.autograd.grad(is_grads_batched=True)
    if (at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() || grads[0].is_neg() || batched) {
      const py::gil_scoped_acquire python;
      const py::object mask_object = mask.defined() ? py::cast(mask) : py::none();
      const py::object result = differentiable_backward()(
          grads[0], x, y, mask_object, coefficients, k, l, statistic, unbiased, exact, x_grad, y_grad);
      const auto [dx, dy] = result.cast<std::pair<std::optional<Tensor>, std::optional<Tensor>>>();
      gradients = {dx.value_or(Tensor()), dy.value_or(Tensor())};
    } else {
      gradients = bird::backward(
          grads[0], x, y, mask, coefficients, k, l, {static_cast<Statistic>(statistic), unbiased, exact}, x_grad, y_grad);
    }
    return {gradients.first, gradients.second, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace
}  // namespace bird

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using bird::dense;
  using bird::Statistic;
  using MaybeTensor = std::optional<at::Tensor>;
  m.attr("MAX_ROWS") = bird::MAX_ROWS;
#ifdef BIRD_CUDA
  m.attr("CUDA") = true;
#else
  m.attr("CUDA") = false;
#endif
  m.def(
      "alignment",
      [](const at::Tensor& x, const at::Tensor& y, const MaybeTensor& mask, int64_t statistic, bool unbiased, bool exact) {
        return bird::Alignment::apply(x, y, mask, statistic, unbiased, exact);
      },
      py::call_guard<py::gil_scoped_release>());
  // A function of x, y, mask and types.Options that makes a whole public call, or returns None to leave it to Python.
  m.def("at_once_where", [](py::function most) {
    return py::cpp_function(
        [checked = bird::AtOnce(std::move(most))](
            py::handle x, py::handle y, py::handle mask, const py::tuple& options) mutable -> MaybeTensor {
          const auto call = checked(x, y, mask, options);
          if (!call) return std::nullopt;
          const py::gil_scoped_release others_may_run;
          return bird::Alignment::apply(call->x, call->y, call->mask, static_cast<int64_t>(call->statistic), call->unbiased, call->exact);
        });
  });
  m.def(
      "forward",
      [](const at::Tensor& x, const at::Tensor& y, const MaybeTensor& mask, int64_t statistic, bool unbiased, bool exact) {
        return bird::forward(x, y, dense(mask), {static_cast<Statistic>(statistic), unbiased, exact});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "backward",
      [](const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, const MaybeTensor& mask, const at::Tensor& coefficients,
         const at::Tensor& k, const at::Tensor& l, bool unbiased, bool exact, bool x_grad, bool y_grad) {
        auto [dx, dy] = bird::backward(
            grad, x, y, dense(mask), coefficients, k, l, {Statistic::cka, unbiased, exact}, x_grad, y_grad);
        const auto none = [](const at::Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; };
        return std::make_pair(none(dx), none(dy));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("emulated_launches", &bird::emulation::launches);
  m.def("set_differentiable_backward", [](py::object function) { bird::differentiable_backward() = std::move(function); });
}
