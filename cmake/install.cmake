# Header, library, find_package(nearep) and nearep.pc.
include(CMakePackageConfigHelpers)
install(FILES ${CMAKE_SOURCE_DIR}/include/nearep.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS nearep EXPORT nearep LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/nearep)
install(EXPORT nearep NAMESPACE nearep:: FILE nearepTargets.cmake DESTINATION ${package_dir})
file(WRITE ${CMAKE_BINARY_DIR}/nearepConfig.cmake
     "include(\"\${CMAKE_CURRENT_LIST_DIR}/nearepTargets.cmake\")\n")
# Before 1.0 a new minor version may change the interface.
write_basic_package_version_file(${CMAKE_BINARY_DIR}/nearepConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/nearepConfig.cmake ${CMAKE_BINARY_DIR}/nearepConfigVersion.cmake
        DESTINATION ${package_dir})
# Paths relative to the file itself: the installed tree may be moved as a whole.
file(RELATIVE_PATH nep_up ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" nep_up "${nep_up}")
configure_file(${CMAKE_SOURCE_DIR}/cmake/nearep.pc.in ${CMAKE_BINARY_DIR}/nearep.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/nearep.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
install(FILES ${CMAKE_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

# Man pages, from the header's comments.
if(NEP_BUILD_MAN)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(Python3_FOUND)
    set(man_dir ${CMAKE_BINARY_DIR}/man)
    add_custom_command(
      OUTPUT ${man_dir}/man7/nearep.7
      COMMAND ${Python3_EXECUTABLE} ${CMAKE_SOURCE_DIR}/scripts/man.py
              ${CMAKE_SOURCE_DIR}/include/nearep.h ${man_dir} ${PROJECT_VERSION}
      DEPENDS ${CMAKE_SOURCE_DIR}/include/nearep.h ${CMAKE_SOURCE_DIR}/scripts/man.py)
    add_custom_target(man ALL DEPENDS ${man_dir}/man7/nearep.7)
    install(DIRECTORY ${man_dir}/man3 ${man_dir}/man7 DESTINATION ${CMAKE_INSTALL_MANDIR})
  else()
    message(STATUS "nearep: no python3, so no man pages; include/nearep.h has the same text")
  endif()
endif()
