// Package certs holds a workload's certificate over its life.
package certs
