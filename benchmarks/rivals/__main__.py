from benchmarks.rivals.run import main

main()
