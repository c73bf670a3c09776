// Decides which calls C++ makes on its own: those of plain arguments for which every check of bird_kernels/inputs.py holds and
// `backends.resolve` would choose the native backend. All others, wrong ones too, are left to Python, which has the errors.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/extension.h>

#include <map>
#include <optional>
#include <string_view>
#include <tuple>

#include "kernels.h"

namespace bird {
namespace {

// A call whose arguments have been checked.
struct Call {
  at::Tensor x, y;
  std::optional<at::Tensor> mask;
  int64_t statistic;  // a Statistic
  bool unbiased, exact;
};

// The positions of the fields of types.Options.
enum Field { STATISTIC, KERNEL, ESTIMATOR, ROW_DIMS, GROUP, CENTER, BACKEND, PRECISION, FIELDS };

// The characters of a str; empty for anything else, subclasses of str too.
std::string_view text(py::handle object) {
  if (!PyUnicode_CheckExact(object.ptr())) return {};
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (data != nullptr) return {data, static_cast<size_t>(size)};
  PyErr_Clear();  // a lone surrogate has no UTF-8
  return {};
}

// Whether an object is an ordinary tensor with `dim` dimensions on a CPU or CUDA device: no subclass, no wrapper of a transform, no
// lazy negative, whose memory holds other numbers than its value, and no inference tensor that autograd would have to save.
bool is_plain(py::handle object, int64_t dim) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet PLAIN(
      {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView,
       DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  if (!THPVariable_CheckExact(object.ptr())) return false;
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  return PLAIN.isSupersetOf(tensor.key_set()) && tensor.dim() == dim && !(tensor.is_inference() && at::GradMode::is_enabled());
}

// Whether a torch.func transform, torch.jit.trace or a dispatch mode is active, which must see operators, as in ops.watched (Python
// checks for torch.compile).
bool is_watched() {
  using c10::DispatchKey;
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  const c10::DispatchKeySet transforms(
      {DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::Tracer});
  return included.has_any(transforms) || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

class AtOnce {
 public:
  // `most` is backends.most_at_once, (backend, dtype, device) -> int: up to how many numbers in x and y together a call with that
  // backend argument and few rows is made here.
  explicit AtOnce(py::function most) : most_(std::move(most)) {}

  // The checked call of x, y, a mask or None and a types.Options; nullopt if it is left to Python.
  std::optional<Call> operator()(py::handle x_object, py::handle y_object, py::handle mask_object, const py::tuple& options) {
    if (options.size() != FIELDS) return {};
    const auto option = [&](Field field) { return py::handle(PyTuple_GET_ITEM(options.ptr(), field)); };
    const py::handle row_dims = option(ROW_DIMS), backend = option(BACKEND), precision = option(PRECISION);
    if (!option(GROUP).is_none() || option(CENTER).ptr() != Py_True) return {};
    const std::string_view requested = text(backend), kind = text(option(ESTIMATOR)), quantity = text(option(STATISTIC));
    const bool automatic = requested == "auto", unbiased = kind == "unbiased", masked = !mask_object.is_none();
    const bool loss = quantity == "cka_loss", cka = quantity == "cka";
    if (!loss && !cka && quantity != "hsic") return {};
    if (!automatic && requested != "native") return {};
    if (text(option(KERNEL)) != "linear" || (!unbiased && kind != "biased")) return {};
    int overflow = 0;
    if (!PyLong_CheckExact(row_dims.ptr()) || PyLong_AsLongAndOverflow(row_dims.ptr(), &overflow) != 1) return {};
    if (!is_plain(x_object, 2) || !is_plain(y_object, 2) || (masked && !is_plain(mask_object, 1)) || is_watched()) return {};

    const at::Tensor &x = THPVariable_Unpack(x_object.ptr()), &y = THPVariable_Unpack(y_object.ptr());
    const int64_t n = x.size(0);
    if (n != y.size(0) || n > MAX_ROWS || n < (unbiased ? 4 : 2) || x.size(1) == 0 || y.size(1) == 0) return {};
    const at::ScalarType type = x.scalar_type();
    if (type != at::kFloat && type != at::kHalf && type != at::kBFloat16) return {};
    if (y.scalar_type() != type || y.device() != x.device()) return {};
    std::optional<at::Tensor> mask;
    if (masked) {
      mask = THPVariable_Unpack(mask_object.ptr());
      if (mask->scalar_type() != at::kBool || mask->size(0) != n || mask->device() != x.device()) return {};
    }

    bool tf32 = false;  // as native._options
    if (precision.is_none()) {
      tf32 = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
    } else {
      const std::string_view name = text(precision);
      tf32 = name == "tf32";
      if (!tf32 && name != "ieee" && name != "tf32x3") return {};
    }
    if (x.numel() + y.numel() > most(automatic, backend, x_object, x)) return {};
    const Statistic wanted = loss ? Statistic::cka_loss : cka ? Statistic::cka : Statistic::hsic;
    return Call{x, y, std::move(mask), static_cast<int64_t>(wanted), unbiased, type == at::kFloat && !tf32};
  }

 private:
  int64_t most(bool automatic, py::handle backend, py::handle object, const at::Tensor& x) {
    const auto [answer, is_new] = answers_.try_emplace({automatic, x.device().type(), x.device().index(), x.scalar_type()}, 0);
    if (is_new) answer->second = most_(backend, object.attr("dtype"), object.attr("device")).cast<int64_t>();
    return answer->second;
  }

  py::function most_;
  std::map<std::tuple<bool, at::Device::Type, at::DeviceIndex, at::ScalarType>, int64_t> answers_;  // of most_, by its arguments
};

}  // namespace
}  // namespace bird
