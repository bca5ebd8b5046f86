module github.com/ztun/ztun/deploy/e2e

go 1.26.3
