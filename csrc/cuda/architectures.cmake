# choose_architectures(WANTED): from the names a user gave ("": the local GPUs', else sm_80 with PTX
# and sm_90a), sets in the caller's scope
#   architectures  as in CMAKE_CUDA_ARCHITECTURES
#   hopper         of these, what runs CUTLASS's wgmma and TMA kernels: sm_90a alone has both
#   others         of these, what runs its mma.sync kernels
function(choose_architectures wanted)
  if(wanted STREQUAL "")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE wanted RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(failed)
      set(wanted "")
    endif()
    string(REPLACE "." "" wanted "${wanted}")
    string(REGEX MATCHALL "[0-9]+" wanted "${wanted}")
    list(REMOVE_DUPLICATES wanted)
    set(local "${wanted}")
    list(FILTER wanted EXCLUDE REGEX "^[1-7][0-9]$")
    if(local AND NOT wanted)
      message(FATAL_ERROR "the local GPU is older than sm_80 (VARIATOR_CUDA_ARCHS names others)")
    elseif(NOT wanted)
      set(wanted "80;90a")
    endif()
  endif()
  list(TRANSFORM wanted REPLACE "^sm_" "")
  # Machine code for sm_90 without its own instructions would be of use to nobody.
  list(TRANSFORM wanted REPLACE "^90a?(-real)?$" "90a-real")
  list(REMOVE_DUPLICATES wanted)
  foreach(name IN LISTS wanted)
    if(NOT name MATCHES "^[0-9]+[af]?(-real|-virtual)?$" OR name MATCHES "^[1-7][0-9]([^0-9]|$)")
      message(FATAL_ERROR
        "VARIATOR_CUDA_ARCHS: ${name} is not 80 or later, such as 80, 90a, 100-real")
    endif()
  endforeach()
  set(architectures "${wanted}" PARENT_SCOPE)
  set(hopper "${wanted}")
  list(FILTER hopper INCLUDE REGEX "^90a")
  set(hopper "${hopper}" PARENT_SCOPE)
  list(FILTER wanted EXCLUDE REGEX "^90a")
  set(others "${wanted}" PARENT_SCOPE)
endfunction()
