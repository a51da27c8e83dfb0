# What the library can be built with here. Only headers are needed: libucp and libibverbs are
# opened with dlopen when a transport is asked for, so that one binary serves machines with and
# without them.
#
# nep_feature(UCX MODULES ucx) sets NEP_HAVE_UCX to 1 or 0, says so, and refuses NEP_UCX=ON without it.
function(nep_feature name)
  cmake_parse_arguments(arg "" "" "MODULES" ${ARGN})
  set(found 0)
  if(NOT NEP_${name} STREQUAL "OFF")
    pkg_check_modules(${name} QUIET ${arg_MODULES})
    if(${name}_FOUND)
      set(found 1)
    elseif(NEP_${name} STREQUAL "ON")
      message(FATAL_ERROR "NEP_${name}=ON, but pkg-config does not find: ${arg_MODULES}. Install "
                          "the development packages, or use NEP_${name}=OFF.")
    endif()
  endif()
  set(NEP_HAVE_${name} ${found} PARENT_SCOPE)
  set(NEP_${name}_INCLUDE_DIRS "${${name}_INCLUDE_DIRS}" PARENT_SCOPE)
  message(STATUS "nearep: ${name} ${found}")
endfunction()

nep_feature(UCX MODULES ucx>=1.13)
nep_feature(VERBS MODULES libibverbs)

set(NEP_HAVE_CUDA 0)
if(NOT NEP_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80 90 100)
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(NEP_HAVE_CUDA 1)
  elseif(NEP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "NEP_CUDA=ON, but there is no nvcc. Put it into PATH, set CUDACXX, or use "
                        "NEP_CUDA=OFF.")
  endif()
endif()
message(STATUS "nearep: CUDA ${NEP_HAVE_CUDA}")

# Instruction sets of the SIMD files; chosen at run time, compiled where the compiler has them.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(NEP_HAVE_X86 1)
else()
  set(NEP_HAVE_X86 0)
endif()
