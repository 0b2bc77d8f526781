/* What this extension's sources share: how a function is made visible to ctypes. */
#ifndef ARMOR_SOLVER_EXPORT_H
#define ARMOR_SOLVER_EXPORT_H

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#endif
